"""The block-causal attention function over packed clips (paper, section 3.1).

Dimension key: B batch, C candidates, S tokens, T cached tokens, H heads, K head width.
"""

import jax
import jax.numpy as jnp
from flax import struct

from elastictok_jax.errors import UsageError
from elastictok_jax.layers.attention.blockwise import BlockwiseKernel
from elastictok_jax.layers.attention.dense import DenseKernel, dense_attention
from elastictok_jax.layers.attention.kernel import Kernel, Visibility, flash_attention
from elastictok_jax.layers.attention.sharded import shard_kernel
from elastictok_jax.layers.attention.tile import merge_softmax

Array = jax.Array
BACKENDS = ("auto", "dense", "blockwise", "splash", "fused")


@struct.dataclass
class SequenceLayout:
    """Positions, segments and blocks of the tokens of a packed sequence.

    Attributes:
      positions_S: int32 [S], positions for rotary embedding. Only differences matter.
      segments_BS: int32 [B, S], the clip each token belongs to; 0 is padding.
      tokens_per_block: L; token i of the sequence is in block i // L.
      past_ids_T: int32 [T], 1 for filled and 0 for empty slots of the KV cache of earlier blocks
        (`attend_to_past`), or None without a cache.
      ranks_BS: int32 [B, S]; token i then sees token j of its clip iff rank(j) <= rank(i), in place
        of blocks. With a cache, of the tokens of the block, which all see the cache.
    """

    positions_S: Array
    segments_BS: Array
    tokens_per_block: int = struct.field(pytree_node=False)
    past_ids_T: Array | None = None
    ranks_BS: Array | None = None


def attention(
    query_BSHK: Array, key_BSHK: Array, value_BSHK: Array, *, places: SequenceLayout, backend: str
) -> Array:
    """Computes attention in which query i sees key j iff clips are equal and block(j) <= block(i),
    or rank(j) <= rank(i) if `places` has ranks.

    Padding (segment 0) sees only padding, so no row is ever empty. Scores are scaled by
    K ** -0.5 and normalised in float32 whatever the dtype of the inputs. If a mesh is set, batch
    and heads are sharded over its devices, and a sharded sequence uses ring attention.

    Args:
      backend: the kernel of each device. "dense" (all scores at once), "blockwise" (tiles, plain
        XLA), "splash" (Pallas kernel for TPUs; interpreted elsewhere), "fused" (Pallas kernels for
        GPUs; interpreted elsewhere), or "auto": splash on a TPU, else blockwise. "fused" is four
        to six times as fast as blockwise on an H200, but has not run on several GPUs or with a
        cache on one, so "auto" does not use it.

    Returns:
      [B, S, H, K] in the dtype of `value_BSHK`.

    Raises:
      UsageError: for ranks of a sequence that is cut over devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    segments_BS, per_block = places.segments_BS, places.tokens_per_block
    ranks_BS = places.ranks_BS
    inputs = [x.swapaxes(1, 2) for x in (query_BSHK, key_BSHK, value_BSHK)]
    kernel = make_kernel(backend, _platform_of(mesh))
    if not mesh.empty and mesh.size > 1:
        kernel = shard_kernel(kernel, inputs[0].shape)
    elif backend == "dense":
        rank_BS = ranks_BS
        if rank_BS is None:
            rank_BS = jnp.arange(segments_BS.shape[1])[None] // per_block
        return dense_attention(
            *(query_BSHK, key_BSHK, value_BSHK),
            query_segments_BS=segments_BS,
            key_segments_BT=segments_BS,
            rank_mask_BST=rank_BS[:, None, :] <= rank_BS[:, :, None],
        )
    if ranks_BS is None:
        visibility = Visibility(segments_BS, segments_BS, per_block)
    else:
        visibility = Visibility(
            *(segments_BS, segments_BS), query_ranks_BS=ranks_BS, key_ranks_BT=ranks_BS
        )
    return flash_attention(kernel, *inputs, visibility).swapaxes(1, 2)


def attend_to_past(
    query_CSHK: Array,
    key_CHSK: Array,
    value_CHSK: Array,
    past_key_HTK: Array,
    past_value_HTK: Array,
    *,
    past_ids_T: Array,
    backend: str,
    ranks_CS: Array | None = None,
) -> Array:
    """Computes attention of one block to itself and to the KV cache of the earlier blocks.

    The C candidates for the block share the cache, which is read once for all of them. Scores equal
    those of `attention` over the full sequence.

    Returns:
      [C, S, H, K] in the dtype of `value_CHSK`.
    """
    kernel = make_kernel(backend, _platform_of(jax.sharding.get_abstract_mesh()))
    count, tokens, heads, _ = query_CSHK.shape
    query_CHSK, ids_CS = query_CSHK.swapaxes(1, 2), jnp.ones((count, tokens), jnp.int32)
    own = Visibility(ids_CS, ids_CS, query_ranks_BS=ranks_CS, key_ranks_BT=ranks_CS)
    out = kernel.forward(query_CHSK, key_CHSK, value_CHSK, own)
    if past_ids_T.size:
        # Candidates are concatenated into one long row of queries.
        query_HSK = jnp.concatenate(list(query_CHSK), axis=1)
        seen = Visibility(ids_CS.reshape(1, -1), past_ids_T[None])
        past = kernel.forward(query_HSK[None], past_key_HTK[None], past_value_HTK[None], seen)
        split = [x[0].reshape(heads, count, tokens, *x.shape[3:]).swapaxes(0, 1) for x in past]
        out = merge_softmax(*out, *split)
    return out[0].swapaxes(1, 2).astype(value_CHSK.dtype)


def _platform_of(mesh: jax.sharding.AbstractMesh) -> str:
    """Returns the platform of the mesh, or of this process if the mesh is empty."""
    return jax.default_backend() if mesh.empty else mesh.abstract_device.platform


def make_kernel(backend: str, platform: str) -> Kernel:
    """Returns the kernel that each device runs.

    Raises:
      ValueError: if there is no such backend.
      UsageError: if this jax does not support the backend.
    """
    if backend == "auto":
        backend = "splash" if platform == "tpu" else "blockwise"
    if backend == "splash":
        from elastictok_jax.layers.attention.splash import SplashKernel  # Pallas imports slowly

        return SplashKernel(interpret=platform != "tpu")
    if backend == "fused":
        return _make_fused(platform)
    if backend == "dense":
        return DenseKernel()
    if backend == "blockwise":
        return BlockwiseKernel()
    raise ValueError(f"attention backend {backend!r}: choose one of {', '.join(BACKENDS)}")


def _make_fused(platform: str) -> Kernel:
    try:
        from elastictok_jax.layers.attention.fused import FusedKernel
    except ImportError as error:
        raise UsageError(
            f"attention backend 'fused' needs jax.experimental.pallas.triton, which jax "
            f"{jax.__version__} lacks ({error}): install a jax of 0.10 to 0.12, or set "
            f"compute.attention = 'blockwise'"
        ) from error
    return FusedKernel(interpret=platform != "gpu")
