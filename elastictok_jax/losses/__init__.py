"""Losses: pure functions of arrays, with no files, flags or devices."""
