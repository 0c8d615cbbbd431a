"""Reads folders, TFDS data sets and synthetic clips, in train and held-out splits."""
