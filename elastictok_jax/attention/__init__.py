"""Block-causal attention: one function, several backends."""
