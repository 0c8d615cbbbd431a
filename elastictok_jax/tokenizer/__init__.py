"""The trained tokenizer: pixels to a chosen number of tokens, and back."""
