"""Data: files and data sets to batches of packed clips."""
