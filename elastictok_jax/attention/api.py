"""Block-causal attention over packed clips (paper, section 3.1): one function.

Dimension key: B batch, S tokens, H heads, K head width.
"""

import jax
from flax import struct

from elastictok_jax.attention.blockwise import blockwise_attention
from elastictok_jax.attention.dense import dense_attention

Array = jax.Array
BACKENDS = ("auto", "dense", "blockwise")


@struct.dataclass
class TokenPlaces:
    """Where each token of a packed sequence stands.

    Attributes:
      positions_S: int32 [S], index of the token in its sequence. Only differences matter.
      segments_BS: int32 [B, S], the clip each token belongs to; 0 is padding.
      tokens_per_block: L; token i is in block positions_S[i] // L.
    """

    positions_S: Array
    segments_BS: Array
    tokens_per_block: int = struct.field(pytree_node=False)


def attention(
    query_BSHK: Array, key_BSHK: Array, value_BSHK: Array, *, places: TokenPlaces, backend: str
) -> Array:
    """Query i sees key j iff both are in one clip and block(j) <= block(i).

    Padding (segment 0) sees only padding, so no row is ever empty. Scores are scaled by
    K ** -0.5 and normalised in float32 whatever the dtype of the inputs.

    Args:
      backend: "dense" (the reference; memory grows with S^2), "blockwise" (each block attends to
        the slice of keys up to itself; needs S to be whole blocks), or "auto".

    Returns:
      [B, S, H, K] in the dtype of `value_BSHK`.
    """
    tokens, per_block = query_BSHK.shape[1], places.tokens_per_block
    if backend == "auto":
        backend = "blockwise" if tokens % per_block == 0 else "dense"
    if backend == "dense":
        blocks_S = places.positions_S // per_block
        return dense_attention(
            query_BSHK,
            key_BSHK,
            value_BSHK,
            query_segments_BS=places.segments_BS,
            key_segments_BT=places.segments_BS,
            block_mask_ST=blocks_S[None, :] <= blocks_S[:, None],
        )
    if backend == "blockwise":
        return blockwise_attention(
            query_BSHK,
            key_BSHK,
            value_BSHK,
            segments_BS=places.segments_BS,
            tokens_per_block=per_block,
        )
    raise ValueError(f"attention backend {backend!r}: choose one of {', '.join(BACKENDS)}")
