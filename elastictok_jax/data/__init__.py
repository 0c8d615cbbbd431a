"""Turns files and data sets into batches of packed clips."""
