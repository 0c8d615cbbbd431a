"""Splash attention, JAX's Pallas kernel for TPUs, as a `Kernel`.

Dimension key: B batch, S queries, T keys, H heads, K head width.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as mask_info

from elastictok_jax.layers.attention.blockwise import BlockwiseKernel
from elastictok_jax.layers.attention.kernel import FILLING, Array, Visibility
from elastictok_jax.layers.attention.tile import pad_to_multiple

LANES = 128
# Maximum queries and keys per tile such that all buffers fit a core's VMEM.
TILE = 512


@dataclasses.dataclass(frozen=True)
class SplashKernel:
    """Splash attention with block-causal masks; tiles hidden by the block mask are skipped.

    Sizes are padded to multiples of 128. If block offsets differ between rows or devices, which a
    static mask cannot express, `Blockwise` is used instead.

    Attributes:
      interpret: run in the interpreter, which is slow but works on any platform.
    """

    interpret: bool

    def forward(self, query_BHSK, key_BHTK, value_BHTK, visibility):
        """As `Kernel.forward`."""
        if not _is_static(visibility):
            return BlockwiseKernel().forward(query_BHSK, key_BHTK, value_BHTK, visibility)
        *inputs, ids = self._inputs(query_BHSK, key_BHTK, value_BHTK, visibility)
        kernel = self._kernel(inputs[0].shape, inputs[1].shape[2], visibility.tokens_per_block)
        out_BHSK, (lse_BHS,) = jax.vmap(kernel)(*inputs, ids)
        tokens, width = query_BHSK.shape[2:]
        return out_BHSK[:, :, :tokens, :width].astype(jnp.float32), lse_BHS[:, :, :tokens]

    def backward(
        self, query_BHSK, key_BHTK, value_BHTK, visibility, *, out_BHSK, lse_BHS, grad_BHSK
    ):
        """As `Kernel.backward`."""
        if not _is_static(visibility):
            return BlockwiseKernel().backward(
                *(query_BHSK, key_BHTK, value_BHTK, visibility),
                out_BHSK=out_BHSK,
                lse_BHS=lse_BHS,
                grad_BHSK=grad_BHSK,
            )
        *inputs, ids = self._inputs(query_BHSK, key_BHTK, value_BHTK, visibility)
        kernel = self._kernel(inputs[0].shape, inputs[1].shape[2], visibility.tokens_per_block)
        out, grad = (_filled(x.astype(value_BHTK.dtype)) for x in (out_BHSK, grad_BHSK))
        lse = pad_to_multiple(lse_BHS, axis=2, multiple=LANES)

        def one_row(inputs, ids, out, lse, grad):
            tiles = (kernel.dq_mask_info, kernel.dkv_mask_info)
            saved = (*inputs, ids, None, out, lse, *tiles)
            # Only the kernel's own gradient rule accepts a log-sum-exp over other keys.
            return splash._splash_attention_bwd(**kernel.kwargs, res=saved, do=grad)[3:6]

        grads = jax.vmap(one_row)(inputs, ids, out, lse, grad)
        query_grad, key_grad, value_grad = (
            grad[:, :, : x.shape[2], : x.shape[3]].astype(jnp.float32)
            for grad, x in zip(grads, (query_BHSK, key_BHTK, value_BHTK), strict=True)
        )
        return query_grad * query_BHSK.shape[-1] ** -0.5, key_grad, value_grad

    def _inputs(self, query_BHSK, key_BHTK, value_BHTK, visibility: Visibility):
        """Scales queries, and pads all inputs and ids to sizes that the kernel accepts."""
        scaled = query_BHSK.astype(jnp.float32) * query_BHSK.shape[-1] ** -0.5
        inputs = (scaled.astype(query_BHSK.dtype), key_BHTK, value_BHTK)
        ids = (
            pad_to_multiple(x, axis=1, multiple=LANES, value=FILLING)
            for x in (visibility.query_ids_BS, visibility.key_ids_BT)
        )
        return *(_filled(x) for x in inputs), splash.SegmentIds(*ids)

    def _kernel(self, query_shape: tuple[int, ...], keys: int, tokens_per_block: int | None):
        _, heads, queries, _ = query_shape
        return _make_kernel(heads, queries, keys, tokens_per_block, self.interpret)


def _is_static(visibility: Visibility) -> bool:
    """Returns whether the kernel's mask, which is a function of indices, can express blocks."""
    return visibility.first_B is None and visibility.query_ranks_BS is None


@dataclasses.dataclass(frozen=True)
class BlockCausal:
    """The mask function of the kernel: whether query i sees key j."""

    tokens_per_block: int

    def __call__(self, i, j):
        return i // self.tokens_per_block >= j // self.tokens_per_block


class BlockCausalMask(masks._ComputableMask):
    """A mask that the kernel evaluates in partially visible tiles."""

    def __init__(self, tokens: int, tokens_per_block: int):
        super().__init__((tokens, tokens), BlockCausal(tokens_per_block))

    def __eq__(self, other):
        return (
            isinstance(other, BlockCausalMask)
            and self.shape == other.shape
            and self.mask_function == other.mask_function
        )

    def __hash__(self):
        return hash((self.shape, self.mask_function))


@functools.cache
def _make_kernel(heads: int, queries: int, keys: int, tokens_per_block: int | None, interpret):
    if tokens_per_block is None:
        mask: masks.Mask = masks.FullMask((queries, keys))
    else:
        mask = BlockCausalMask(queries, tokens_per_block)
    q, k = _tile(queries), _tile(keys)
    all_heads = masks.MultiHeadMask([mask] * heads)
    # Built by hand, since `make_splash_mha` puts these on the devices of the current mesh, which
    # may be an abstract topology.
    by_queries, mask_function = mask_info.process_mask(all_heads, (q, k))
    by_keys, _ = mask_info.process_mask_dkv(all_heads, (q, k))
    return splash.SplashAttentionKernel(
        by_queries,
        by_queries,
        by_keys,
        block_sizes=splash.BlockSizes(
            block_q=q,
            block_kv=k,
            block_kv_compute=k,
            block_q_dkv=q,
            block_kv_dkv=k,
            block_kv_dkv_compute=k,
            block_q_dq=q,
            block_kv_dq=k,
        ),
        is_mqa=False,
        save_residuals=True,
        mask_value=splash.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=None,
        mask_function=mask_function,
        interpret=interpret,
    )


def _tile(tokens: int) -> int:
    return max(size for size in range(LANES, TILE + 1, LANES) if tokens % size == 0)


def _filled(x_BHSK: Array) -> Array:
    """Pads with zeros to multiples of LANES, which changes no score."""
    return pad_to_multiple(pad_to_multiple(x_BHSK, axis=2, multiple=LANES), axis=3, multiple=LANES)
