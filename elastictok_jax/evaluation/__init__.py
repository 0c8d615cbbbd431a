"""Measures trained tokenizers as in the paper and reports the results."""
