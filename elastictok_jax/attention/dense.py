"""Attention with every score held at once: the reference that other backends are tested against.

Dimension key: B batch, S queries, T keys, H heads, K head width.
"""

import jax
import jax.numpy as jnp

Array = jax.Array


def dense_attention(
    query_BSHK: Array,
    key_BTHK: Array,
    value_BTHK: Array,
    *,
    query_segments_BS: Array,
    key_segments_BT: Array,
    block_mask_ST: Array | None,
) -> Array:
    """Softmax attention among equal segments, further limited by `block_mask_ST` if given.

    Scores and softmax are float32. Every query must see at least one key.

    Returns:
      [B, S, H, K] in the dtype of `value_BTHK`.
    """
    scores_BHST = jnp.einsum(
        "bshk,bthk->bhst", query_BSHK, key_BTHK, preferred_element_type=jnp.float32
    )
    scores_BHST *= query_BSHK.shape[-1] ** -0.5
    visible_BST = query_segments_BS[:, :, None] == key_segments_BT[:, None, :]
    if block_mask_ST is not None:
        visible_BST &= block_mask_ST
    scores_BHST = jnp.where(visible_BST[:, None], scores_BHST, -jnp.inf)
    weights_BHST = jax.nn.softmax(scores_BHST, axis=-1).astype(value_BTHK.dtype)
    return jnp.einsum("bhst,bthk->bshk", weights_BHST, value_BTHK)
