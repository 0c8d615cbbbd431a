"""Attention that materialises all scores, the reference that other backends are tested against.

Dimension key: B batch, S queries, T keys, H heads, K head width.
"""

import dataclasses

import jax
import jax.numpy as jnp

from elastictok_jax.layers.attention.tile import (
    Stretch,
    output_dot_gradient,
    tile_backward,
    tile_forward,
    tile_mask,
)

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class DenseKernel:
    """The reference as a `Kernel` with a single tile, for rings."""

    def forward(self, query_BHSK, key_BHTK, value_BHTK, visibility):
        """As `Kernel.forward`."""
        mask_BST = self._mask(query_BHSK, key_BHTK, visibility)
        return tile_forward(query_BHSK, key_BHTK, value_BHTK, mask_BST)

    def backward(
        self, query_BHSK, key_BHTK, value_BHTK, visibility, *, out_BHSK, lse_BHS, grad_BHSK
    ):
        """As `Kernel.backward`."""
        mask_BST = self._mask(query_BHSK, key_BHTK, visibility)
        return tile_backward(
            *(query_BHSK, key_BHTK, value_BHTK, mask_BST),
            lse_BHS=lse_BHS,
            grad_BHSK=grad_BHSK.astype(value_BHTK.dtype),
            delta_BHS=output_dot_gradient(out_BHSK, grad_BHSK),
        )

    def _mask(self, query_BHSK, key_BHTK, visibility):
        return tile_mask(visibility, Stretch(0, query_BHSK.shape[2]), Stretch(0, key_BHTK.shape[2]))


def dense_attention(
    query_BSHK: Array,
    key_BTHK: Array,
    value_BTHK: Array,
    *,
    query_segments_BS: Array,
    key_segments_BT: Array,
    rank_mask_BST: Array | None,
) -> Array:
    """Computes softmax attention within segments, further limited by `rank_mask_BST` if given.

    Scores and softmax are float32. Every query must see at least one key.

    Returns:
      [B, S, H, K] in the dtype of `value_BTHK`.
    """
    scores_BHST = jnp.einsum(
        "bshk,bthk->bhst", query_BSHK, key_BTHK, preferred_element_type=jnp.float32
    )
    scores_BHST *= query_BSHK.shape[-1] ** -0.5
    visible_BST = query_segments_BS[:, :, None] == key_segments_BT[:, None, :]
    if rank_mask_BST is not None:
        visible_BST &= rank_mask_BST
    scores_BHST = jnp.where(visible_BST[:, None], scores_BHST, -jnp.inf)
    weights_BHST = jax.nn.softmax(scores_BHST, axis=-1).astype(value_BTHK.dtype)
    return jnp.einsum("bhst,bthk->bshk", weights_BHST, value_BTHK)
