"""Masked reconstruction and KL terms, as sums, so that microbatches add up exactly.

Dimension key: B batch, S tokens, D values a patch.
"""

import jax
import jax.numpy as jnp

Array = jax.Array


def squared_error_sum(reconstruction_BSD: Array, target_BSD: Array, valid_BS: Array) -> Array:
    """Sum over valid tokens of the mean squared error of a token's pixels. float32 scalar."""
    error_BS = jnp.mean((reconstruction_BSD - target_BSD) ** 2, axis=-1)
    return jnp.sum(jnp.where(valid_BS, error_BS, 0.0))


def kl_sum(kl_BS: Array, kept_BS: Array) -> Array:
    """Sum of the KL over kept tokens; divide by blocks for the paper's term. float32 scalar."""
    return jnp.sum(jnp.where(kept_BS, kl_BS, 0.0))
