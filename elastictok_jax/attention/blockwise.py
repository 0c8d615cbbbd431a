"""Attention one query block at a time, over the slice of keys that the block may see.

Dimension key: B batch, S tokens, H heads, K head width, N blocks, L tokens a block.
"""

import jax
import jax.numpy as jnp

from elastictok_jax.attention.dense import dense_attention

Array = jax.Array


def blockwise_attention(
    query_BSHK: Array,
    key_BSHK: Array,
    value_BSHK: Array,
    *,
    segments_BS: Array,
    tokens_per_block: int,
) -> Array:
    """Block-causal attention over whole blocks without computing a score that the mask hides.

    Block i attends to the static slice of keys [0, (i + 1) L), so there is no S x S mask and only
    (N + 1) / 2N of the dense work. Scores of one block live at a time: the backward pass computes
    them again, and memory grows with L x S.

    Raises:
      ValueError: if S is not a whole number of blocks.
    """
    tokens = query_BSHK.shape[1]
    if tokens % tokens_per_block:
        raise ValueError(f"{tokens} tokens are not whole blocks of {tokens_per_block}")

    @jax.checkpoint
    def one_block(query: Array, key: Array, value: Array, segments: Array) -> Array:
        return dense_attention(
            query,
            key,
            value,
            query_segments_BS=segments[:, -tokens_per_block:],
            key_segments_BT=segments,
            block_mask_ST=None,
        )

    outputs = []
    for end in range(tokens_per_block, tokens + 1, tokens_per_block):
        outputs.append(
            one_block(
                query_BSHK[:, end - tokens_per_block : end],
                key_BSHK[:, :end],
                value_BSHK[:, :end],
                segments_BS[:, :end],
            )
        )
    return jnp.concatenate(outputs, axis=1)
