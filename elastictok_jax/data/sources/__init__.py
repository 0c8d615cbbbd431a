"""Data sources: folders, TFDS data sets and synthetic footage, in train and held-out splits."""
