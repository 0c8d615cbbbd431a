"""`elastictok prepare`: originals to record data sets."""
