"""Measuring a trained tokenizer the way the paper does, and showing it."""
