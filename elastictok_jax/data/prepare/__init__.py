"""Converts originals to record data sets: `elastictok prepare`."""
