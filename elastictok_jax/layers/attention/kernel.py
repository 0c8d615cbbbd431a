"""The attention kernel protocol: forward and backward over a rectangle of queries and keys.

Dimension key: B batch, S queries, T keys, H heads, K head width.

A kernel returns the log-sum-exp of its scores along with its output, and its backward pass takes
the log-sum-exp of *all* scores of a query. The results over several rectangles of keys therefore
combine to those over all keys, which is how tiles of a sequence and devices of a ring are merged.
"""

from functools import partial
from typing import Protocol

import jax
from flax import struct
from jax.ad_checkpoint import checkpoint_name

Array = jax.Array

# Score of hidden keys. It is finite, so that a query that sees nothing in a rectangle gets a
# log-sum-exp of negligible weight in `merge_softmax`, and no intermediate is NaN.
HIDDEN_SCORE = -1e30
# Id of padding up to a kernel's size, which no clip has.
FILLING = -1
# Names of the residuals of the backward pass, for remat policies.
SAVED_NAMES = ("attention_out", "attention_lse")


@struct.dataclass
class Visibility:
    """A mask in which query i sees key j iff their ids are equal and block(j) <= block(i).

    With ranks, i sees j iff their ids are equal and rank(j) <= rank(i): patches of rank 0 and
    registers of ranks 1, 2, ... let patches see all patches, and register k patches and registers
    up to k. Uniform blocks are the fast path: what they hide is known when tiles are chosen.

    Attributes:
      query_ids_BS, key_ids_BT: int32. Only equality counts.
      tokens_per_block: L, if queries and keys are the same tokens: token i is then in block
        (first_B + i) // L. None disables the block mask.
      first_B: int32 [B], offset of token 0 within its block; None if it is 0 in every row.
      query_ranks_BS, key_ranks_BT: int32 in any order, in place of blocks; None for both or none.
    """

    query_ids_BS: Array
    key_ids_BT: Array
    tokens_per_block: int | None = struct.field(pytree_node=False, default=None)
    first_B: Array | None = None
    query_ranks_BS: Array | None = None
    key_ranks_BT: Array | None = None

    def blocks_hide(self, queries: range, keys: range) -> bool:
        """Returns whether blocks may hide any of `keys` from any of `queries`."""
        length = self.tokens_per_block
        if length is None:
            return False
        if self.first_B is not None:
            return keys[-1] > queries[0]
        return keys[-1] // length > queries[0] // length

    def blocks_hide_all(self, queries: range, keys: range) -> bool:
        """Returns whether blocks hide all of `keys` from all of `queries`, in every row."""
        length = self.tokens_per_block
        if length is None:
            return False
        if self.first_B is not None:
            return keys[0] - queries[-1] >= length
        return keys[0] // length > queries[-1] // length


class Kernel(Protocol):
    """Attention over a rectangle of queries and keys. Instances are hashable."""

    def forward(
        self, query_BHSK: Array, key_BHTK: Array, value_BHTK: Array, visibility: Visibility
    ) -> tuple[Array, Array]:
        """Computes the output [B, H, S, K] and the log-sum-exp [B, H, S] of scores, in float32.

        Scores are scaled by K ** -0.5. A query that sees no key gets an arbitrary finite output and
        a log-sum-exp below -1e29.
        """
        ...

    def backward(
        self,
        query_BHSK: Array,
        key_BHTK: Array,
        value_BHTK: Array,
        visibility: Visibility,
        *,
        out_BHSK: Array,
        lse_BHS: Array,
        grad_BHSK: Array,
    ) -> tuple[Array, Array, Array]:
        """Computes the float32 gradients of query, key and value.

        `out_BHSK` and `lse_BHS` are over all keys that the queries see, in this rectangle and
        others; `grad_BHSK` is the gradient of that output.
        """
        ...


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def flash_attention(
    kernel: Kernel, query_BHSK: Array, key_BHTK: Array, value_BHTK: Array, visibility: Visibility
) -> Array:
    """Computes differentiable attention by `kernel`, [B, H, S, K] in the dtype of `value_BHTK`.

    The backward pass recomputes the scores from the residuals in SAVED_NAMES.
    """
    return _forward(kernel, query_BHSK, key_BHTK, value_BHTK, visibility)[0]


def _forward(kernel, query_BHSK, key_BHTK, value_BHTK, visibility):
    out_BHSK, lse_BHS = kernel.forward(query_BHSK, key_BHTK, value_BHTK, visibility)
    out_BHSK = checkpoint_name(out_BHSK.astype(value_BHTK.dtype), "attention_out")
    lse_BHS = checkpoint_name(lse_BHS, "attention_lse")
    return out_BHSK, (query_BHSK, key_BHTK, value_BHTK, visibility, out_BHSK, lse_BHS)


def _backward(kernel, saved, grad_BHSK):
    query_BHSK, key_BHTK, value_BHTK, visibility, out_BHSK, lse_BHS = saved
    inputs = (query_BHSK, key_BHTK, value_BHTK)
    grads = kernel.backward(
        *inputs, visibility, out_BHSK=out_BHSK, lse_BHS=lse_BHS, grad_BHSK=grad_BHSK
    )
    return *(grad.astype(x.dtype) for grad, x in zip(grads, inputs, strict=True)), None


flash_attention.defvjp(_forward, _backward)
