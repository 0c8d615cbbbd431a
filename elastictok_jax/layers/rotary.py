"""Rotary position embedding, exact at any position.

Dimension key: B batch, S tokens, H heads, K head width.
"""

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def rotary_pairs_to_halves(kernel: Array) -> Array:
    """Reorders the last axis from pairs (2i, 2i + 1) to halves: all even dims, then all odd ones.

    It is nearly free on a kernel, unlike on activations. Scores do not change if queries and keys
    are reordered in the same way.
    """
    *lead, dims = kernel.shape
    return kernel.reshape(*lead, dims // 2, 2).swapaxes(-1, -2).reshape(kernel.shape)


def apply_rotary_embedding(x_BSHK: Array, positions_S: Array, *, theta: float) -> Array:
    """Applies rotary embedding in float32 to dims in halves order (`rotary_pairs_to_halves`).

    Dims i and i + K/2 are the interleaved pair (2i, 2i + 1) of the published weights. The result
    has the dtype of the input.
    """
    turns_SK = positions_S.astype(jnp.uint32)[:, None] * _rotary_turns(x_BSHK.shape[-1], theta)
    angle_SK = turns_SK.astype(jnp.float32) * jnp.float32(2 * np.pi / 2.0**32)
    cos_SHK, sin_SHK = jnp.cos(angle_SK)[:, None], jnp.sin(angle_SK)[:, None]
    even, odd = jnp.split(x_BSHK.astype(jnp.float32), 2, axis=-1)
    halves = [even * cos_SHK - odd * sin_SHK, even * sin_SHK + odd * cos_SHK]
    return jnp.concatenate(halves, axis=-1).astype(x_BSHK.dtype)


def _rotary_turns(head_width: int, theta: float) -> np.ndarray:
    """Returns rotary frequencies uint32 [K/2]: turns per token in units of 2^-32.

    The wrapping uint32 product of a position and a frequency is the exact angle modulo one turn, so
    the phase between two tokens depends only on their distance, at any position. A float32 product
    is off by up to 0.03 rad at a million tokens, a bfloat16 table by entire turns.
    """
    exponents = np.arange(0, head_width, 2, dtype=np.float64) / head_width
    return np.round(2.0**32 / (2 * np.pi) * theta**-exponents).astype(np.uint32)
