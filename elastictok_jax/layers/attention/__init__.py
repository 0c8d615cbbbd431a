"""Block-causal attention: one function and its backends."""
