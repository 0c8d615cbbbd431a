"""Counts how often the codes of a codebook occur, and says how much of it is in use."""

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def codebook_counts(codes_BS: Array, weights_BS: Array, *, codebook_size: int) -> Array:
    """float32 [codebook_size]: how often each code occurs, by one scatter-add into the table."""
    return jnp.zeros(codebook_size, jnp.float32).at[codes_BS].add(weights_BS.astype(jnp.float32))


def codebook_use(counts: np.ndarray) -> dict[str, float]:
    """How much of the codebook is in use.

    Returns:
      usage: share of codes seen; perplexity: exp of the entropy of their use, 1 for no tokens.
    """
    share = counts[counts > 0] / max(counts.sum(), 1.0)
    return {
        "usage": float(np.mean(counts > 0)),
        "perplexity": float(np.exp(-np.sum(share * np.log(share)))),
    }
