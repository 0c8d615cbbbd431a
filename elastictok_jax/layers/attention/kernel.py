"""What an attention kernel is: forward and backward over a rectangle of queries and keys.

Dimension key: B batch, S queries, T keys, H heads, K head width.

A kernel returns the log-sum-exp of its scores beside its output, and its backward pass takes the
log-sum-exp of *all* scores of a query. So the results over several rectangles of keys add up to
those over all keys: that is how tiles of a sequence and devices of a ring are put together.
"""

from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name

Array = jax.Array

# Score of what is not visible: finite, so that a query that sees nothing in a rectangle has a
# log-sum-exp which weighs nothing beside any real one, and no step of the arithmetic is a NaN.
HIDDEN_SCORE = -1e30
# No clip has this id: what fills a rectangle up to a kernel's size.
FILLING = -1
# Names of what the backward pass needs of the forward pass, for remat policies.
SAVED_NAMES = ("attention_out", "attention_lse")


@struct.dataclass
class Visibility:
    """Query i sees key j iff their ids are equal and block(j) <= block(i).

    Attributes:
      query_ids_BS, key_ids_BT: int32. Only equality counts.
      tokens_per_block: L, where queries and keys are the same tokens: token i is then in block
        (first_B + i) // L. None: blocks hide nothing.
      first_B: int32 [B], place in its block of token 0; None where that is 0 in every row.
    """

    query_ids_BS: Array
    key_ids_BT: Array
    tokens_per_block: int | None = struct.field(pytree_node=False, default=None)
    first_B: Array | None = None

    def blocks_hide(self, queries: range, keys: range) -> bool:
        """Whether blocks may hide some of `keys` from some of `queries`."""
        length = self.tokens_per_block
        if length is None:
            return False
        if self.first_B is not None:
            return keys[-1] > queries[0]
        return keys[-1] // length > queries[0] // length

    def blocks_hide_all(self, queries: range, keys: range) -> bool:
        """Whether blocks hide all of `keys` from all of `queries`, in every row."""
        length = self.tokens_per_block
        if length is None:
            return False
        if self.first_B is not None:
            return keys[0] - queries[-1] >= length
        return keys[0] // length > queries[-1] // length


class Kernel(Protocol):
    """Attention over a rectangle. Instances are hashable; arrays are as the method says."""

    def forward(
        self, query_BHSK: Array, key_BHTK: Array, value_BHTK: Array, visibility: Visibility
    ) -> tuple[Array, Array]:
        """float32 output [B, H, S, K] and log-sum-exp [B, H, S] of scores scaled by K ** -0.5.

        A query that sees no key gets any finite output, and a log-sum-exp below -1e29.
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
        """float32 gradients of query, key and value.

        `out_BHSK` and `lse_BHS` are those over all keys that the queries see, here or elsewhere;
        `grad_BHSK` is the gradient of that output.
        """
        ...


def merge(
    out_BHSK: Array, lse_BHS: Array, more_out_BHSK: Array, more_lse_BHS: Array
) -> tuple[Array, Array]:
    """Output and log-sum-exp over two disjoint sets of keys, from those over each."""
    lse = jnp.logaddexp(lse_BHS, more_lse_BHS)
    share, more_share = jnp.exp(lse_BHS - lse), jnp.exp(more_lse_BHS - lse)
    return out_BHSK * share[..., None] + more_out_BHSK * more_share[..., None], lse


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def flash_attention(
    kernel: Kernel, query_BHSK: Array, key_BHTK: Array, value_BHTK: Array, visibility: Visibility
) -> Array:
    """Attention by `kernel`, [B, H, S, K] in the dtype of `value_BHTK`, differentiable.

    The backward pass computes the scores again from what SAVED_NAMES names.
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


def fill(x: Array, *, axis: int, multiple: int, value: int = 0) -> Array:
    """`x` with `value` appended until its size along `axis` is a multiple of `multiple`."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths, constant_values=value)
