"""Measures trained tokenizers as the paper does, and reports it."""
