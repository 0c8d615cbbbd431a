"""Arithmetic of one tile of scores, forward and backward; padding to tiles, and merging of tiles.

Dimension key: B batch, S queries, T keys, H heads, K head width.
"""

import dataclasses

import jax
import jax.numpy as jnp

from elastictok_jax.layers.attention.kernel import HIDDEN_SCORE, Array, Visibility


@dataclasses.dataclass(frozen=True)
class Stretch:
    """A range of a sequence axis with a static size and a static or traced start."""

    start: int | Array
    size: int

    def of(self, x: Array, axis: int = 2) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, self.start, self.size, axis)

    def put(self, x: Array, part: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(x, part, self.start, 2)


def tile_mask(visibility: Visibility, queries: Stretch, keys: Stretch) -> Array:
    """Returns the visibility mask of a tile, bool [B, S, T]."""
    query_ids_BS = queries.of(visibility.query_ids_BS, axis=1)
    key_ids_BT = keys.of(visibility.key_ids_BT, axis=1)
    mask_BST = query_ids_BS[:, :, None] == key_ids_BT[:, None, :]
    if visibility.query_ranks_BS is not None and visibility.key_ranks_BT is not None:
        query_ranks_BS = queries.of(visibility.query_ranks_BS, axis=1)
        key_ranks_BT = keys.of(visibility.key_ranks_BT, axis=1)
        return mask_BST & (key_ranks_BT[:, None, :] <= query_ranks_BS[:, :, None])
    length = visibility.tokens_per_block
    if length is None:
        return mask_BST
    first_B1 = 0 if visibility.first_B is None else visibility.first_B[:, None]
    query_block_BS = (first_B1 + queries.start + jnp.arange(queries.size)[None]) // length
    key_block_BT = (first_B1 + keys.start + jnp.arange(keys.size)[None]) // length
    return mask_BST & (key_block_BT[:, None, :] <= query_block_BS[:, :, None])


def output_dot_gradient(out_BHSK: Array, grad_BHSK: Array) -> Array:
    """Computes the term that the softmax gradient subtracts from every score, float32 [B, H, S]."""
    return jnp.sum(out_BHSK.astype(jnp.float32) * grad_BHSK.astype(jnp.float32), axis=-1)


def _tile_scores(query_BHSK: Array, key_BHTK: Array, mask_BST: Array) -> Array:
    """Computes scaled and masked scores, float32 [B, H, S, T]."""
    scores_BHST = jnp.einsum(
        "bhsk,bhtk->bhst", query_BHSK, key_BHTK, preferred_element_type=jnp.float32
    )
    scores_BHST *= query_BHSK.shape[-1] ** -0.5
    return jnp.where(mask_BST[:, None], scores_BHST, HIDDEN_SCORE)


def tile_forward(
    query_BHSK: Array, key_BHTK: Array, value_BHTK: Array, mask_BST: Array
) -> tuple[Array, Array]:
    """Computes the output and log-sum-exp of one tile."""
    scores_BHST = _tile_scores(query_BHSK, key_BHTK, mask_BST)
    top_BHS = jnp.max(scores_BHST, axis=-1)
    weights_BHST = jnp.exp(scores_BHST - top_BHS[..., None])
    total_BHS = jnp.sum(weights_BHST, axis=-1)
    out_BHSK = jnp.einsum(
        "bhst,bhtk->bhsk",
        weights_BHST.astype(value_BHTK.dtype),
        value_BHTK,
        preferred_element_type=jnp.float32,
    )
    return out_BHSK / total_BHS[..., None], top_BHS + jnp.log(total_BHS)


def tile_backward(
    query_BHSK: Array,
    key_BHTK: Array,
    value_BHTK: Array,
    mask_BST: Array,
    *,
    lse_BHS: Array,
    grad_BHSK: Array,
    delta_BHS: Array,
) -> tuple[Array, Array, Array]:
    """Computes one tile's contribution to the gradients; `delta_BHS` is `output_dot_gradient`."""

    def product(spec: str, left: Array, right: Array) -> Array:
        return jnp.einsum(spec, left, right, preferred_element_type=jnp.float32)

    scores_BHST = _tile_scores(query_BHSK, key_BHTK, mask_BST)
    weights_BHST = jnp.exp(scores_BHST - lse_BHS[..., None])
    value_grad = product("bhst,bhsk->bhtk", weights_BHST.astype(value_BHTK.dtype), grad_BHSK)
    weight_grad_BHST = product("bhsk,bhtk->bhst", grad_BHSK, value_BHTK)
    score_grad_BHST = weights_BHST * (weight_grad_BHST - delta_BHS[..., None])
    score_grad_BHST = (score_grad_BHST * query_BHSK.shape[-1] ** -0.5).astype(query_BHSK.dtype)
    query_grad = product("bhst,bhtk->bhsk", score_grad_BHST, key_BHTK)
    key_grad = product("bhst,bhsk->bhtk", score_grad_BHST, query_BHSK)
    return query_grad, key_grad, value_grad


def merge_softmax(
    out_BHSK: Array, lse_BHS: Array, more_out_BHSK: Array, more_lse_BHS: Array
) -> tuple[Array, Array]:
    """Merges outputs and log-sum-exps over two disjoint sets of keys."""
    lse = jnp.logaddexp(lse_BHS, more_lse_BHS)
    weight, more_weight = jnp.exp(lse_BHS - lse), jnp.exp(more_lse_BHS - lse)
    return out_BHSK * weight[..., None] + more_out_BHSK * more_weight[..., None], lse


def pad_to_multiple(x: Array, *, axis: int, multiple: int, value: int = 0) -> Array:
    """Pads `x` at the end of `axis` with `value` to a multiple of `multiple`."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths, constant_values=value)
