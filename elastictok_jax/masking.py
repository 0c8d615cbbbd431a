"""Draws how many tokens each block keeps, as pure functions of a key (paper, section 3.2).

The length of a block is a function of (seed, step, global block index), so it is the same on every
mesh and for any number of hosts. Dimension key: B batch, N blocks, S tokens, L tokens a block.
"""

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
MASKINGS = ("uniform", "fixed", "powers_of_two", "truncated_normal")


def powers_of_two_lengths(min_tokens: int, max_tokens: int) -> np.ndarray:
    """Returns the powers of two in [min_tokens, max_tokens], ascending, int32."""
    powers = 2 ** np.arange(max_tokens.bit_length(), dtype=np.int64)
    return powers[(powers >= min_tokens) & (powers <= max_tokens)].astype(np.int32)


def draw_lengths(
    key: Array,
    block_index: Array,
    *,
    kind: str,
    min_tokens: int,
    max_tokens: int,
    fraction: float = 0.5,
    mean: float = 0.5,
    deviation: float = 0.25,
) -> Array:
    """Draws the tokens that each block keeps, with its own key fold_in(key, block_index).

    Args:
      key: a key of (seed, step).
      block_index: int32, any shape: index of the block among all blocks of the global batch.
      kind: "uniform" over {min_tokens, ..., max_tokens}, both ends included (the paper);
        "fixed" round(fraction * max_tokens), the paper's baseline; "powers_of_two" uniform over
        those in range; "truncated_normal" with `mean` and `deviation` as fractions of max_tokens,
        truncated rather than clipped to the range, so that its ends are not more likely.

    Returns:
      int32, shape of `block_index`, in [min_tokens, max_tokens] (for "fixed": as given).
    """
    if kind == "fixed":
        return jnp.full(block_index.shape, max(1, round(fraction * max_tokens)), jnp.int32)

    def draw(index: Array) -> Array:
        block_key = jax.random.fold_in(key, index)
        if kind == "uniform":
            return jax.random.randint(block_key, (), min_tokens, max_tokens + 1)
        if kind == "powers_of_two":
            return jax.random.choice(block_key, powers_of_two_lengths(min_tokens, max_tokens))
        if kind == "truncated_normal":
            # Half a token beyond each end, so that both ends are as likely as their neighbours.
            center, scale = mean * max_tokens, deviation * max_tokens
            low = (min_tokens - 0.5 - center) / scale
            high = (max_tokens + 0.5 - center) / scale
            value = center + scale * jax.random.truncated_normal(block_key, low, high)
            return jnp.clip(jnp.round(value).astype(jnp.int32), min_tokens, max_tokens)
        raise ValueError(f"masking kind {kind!r}: choose one of {', '.join(MASKINGS)}")

    return jax.vmap(draw)(block_index.reshape(-1)).reshape(block_index.shape)


def keep_mask(lengths_BN: Array, *, tokens_per_block: int) -> Array:
    """Returns bool [B, S], true for the first lengths_BN[b, n] tokens of each block."""
    keep_BNL = jnp.arange(tokens_per_block) < lengths_BN[..., None]
    return keep_BNL.reshape(*lengths_BN.shape[:-1], -1)
