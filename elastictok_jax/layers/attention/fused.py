"""Flash attention for GPUs as Pallas kernels, lowered to Triton.

Dimension key: B batch, S queries, T keys, H heads, K head width, G tiles of the held side, P tiles
of the passing side. Places [B, N, tokens] are the id of each token and, if the block mask may cut a
tile (N = 2), its block.

A program holds a tile of queries (or of keys, for their gradients) and iterates over the tiles of
the other side, from the first to the last that may be visible. Scores never leave the chip, and
leading and trailing tiles hidden by blocks or clips are skipped. Scores are in base 2 inside the
kernels, as is the hardware's exponential.

Status: the kernels match the dense reference in the interpreter and on an H200, where they reach
40% of the matmul peak forward and backward (benchmarks/RESULTS.md; cuDNN, without a mask, 60%).
jax 0.12 deprecates Pallas for Triton; `make_kernel` raises an error if it is missing.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from elastictok_jax.errors import UsageError
from elastictok_jax.layers.attention.kernel import FILLING, HIDDEN_SCORE, Array, Visibility
from elastictok_jax.layers.attention.tile import output_dot_gradient, pad_to_multiple

DTYPES = ("bfloat16", "float16", "float32")
# Tensor cores need at least MIN_WIDTH; beyond MAX_WIDTH, tiles do not fit on the chip.
MIN_WIDTH, MAX_WIDTH = 16, 128
# Triton uses 32-bit offsets into arrays.
MAX_ELEMENTS = 2**31 - 1
LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tokens that a program holds, and tokens that pass by at a time: powers of two from 16."""

    held: int
    passing: int
    warps: int

    @property
    def multiple(self) -> int:
        """The padding multiple, which both sizes divide."""
        return max(self.held, self.passing)


@dataclasses.dataclass(frozen=True)
class FusedKernel:
    """Flash attention in three kernels: output; gradient of queries; gradients of keys and values.

    Sizes are padded to multiples of the tiles. float32 is multiplied in float32, without tensor
    cores. The tiles use less than the 99 KiB of shared memory per SM available from Ampere on; they
    have not been tuned.

    Attributes:
      interpret: run in the interpreter, which is slow but works on any platform.
      forward_tiles, backward_tiles: for 2-byte inputs; 4-byte inputs get tiles of half the size.
    """

    interpret: bool
    forward_tiles: Tiles = Tiles(held=128, passing=64, warps=8)
    backward_tiles: Tiles = Tiles(held=64, passing=64, warps=4)

    def forward(self, query_BHSK, key_BHTK, value_BHTK, visibility):
        """As `Kernel.forward`.

        Raises:
          UsageError: if the kernels do not support the head width, dtype or size.
        """
        check_fused(query_BHSK, key_BHTK)
        tiles = _fitting(self.forward_tiles, query_BHSK.dtype)
        query, key, value = (_filled(x, tiles.multiple) for x in (query_BHSK, key_BHTK, value_BHTK))
        query_places, key_places = _places(visibility, tiles.multiple)
        visible = _may_see(query_places, key_places, tiles.held, tiles.passing)
        out_BHSK, lse_BHS = self._call(
            partial(_forward_kernel, scale=query_BHSK.shape[3] ** -0.5),
            tiles,
            stretches=_stretches(visible),
            held=[_needed(query_places, visibility, tiles), query],
            passing=[_needed(key_places, visibility, tiles), key, value],
            results=[query.shape, query.shape[:3]],
        )
        tokens, width = query_BHSK.shape[2:]
        return out_BHSK[:, :, :tokens, :width], lse_BHS[:, :, :tokens]

    def backward(
        self, query_BHSK, key_BHTK, value_BHTK, visibility, *, out_BHSK, lse_BHS, grad_BHSK
    ):
        """As `Kernel.backward`.

        Raises:
          UsageError: as `forward`.
        """
        check_fused(query_BHSK, key_BHTK)
        tiles = _fitting(self.backward_tiles, query_BHSK.dtype)
        query, key, value, grad = (
            _filled(x, tiles.multiple)
            for x in (query_BHSK, key_BHTK, value_BHTK, grad_BHSK.astype(value_BHTK.dtype))
        )
        lse2, delta = (
            pad_to_multiple(x, axis=2, multiple=tiles.multiple)
            for x in (lse_BHS * LOG2_E, output_dot_gradient(out_BHSK, grad_BHSK))
        )
        query_places, key_places = _places(visibility, tiles.multiple)
        of_queries = [_needed(query_places, visibility, tiles), query, grad, lse2, delta]
        of_keys = [_needed(key_places, visibility, tiles), key, value]
        scale = query_BHSK.shape[3] ** -0.5
        (query_grad,) = self._call(
            partial(_query_grad_kernel, scale=scale),
            tiles,
            stretches=_stretches(_may_see(query_places, key_places, tiles.held, tiles.passing)),
            held=of_queries,
            passing=of_keys,
            results=[query.shape],
        )
        visible = _may_see(query_places, key_places, tiles.passing, tiles.held)
        key_grad, value_grad = self._call(
            partial(_key_grad_kernel, scale=scale),
            tiles,
            stretches=_stretches(visible.swapaxes(1, 2)),
            held=of_keys,
            passing=of_queries,
            results=[key.shape, key.shape],
        )
        return tuple(
            grad[:, :, : x.shape[2], : x.shape[3]]
            for grad, x in (
                (query_grad, query_BHSK),
                (key_grad, key_BHTK),
                (value_grad, value_BHTK),
            )
        )

    def _call(
        self,
        kernel: Callable,
        tiles: Tiles,
        *,
        stretches: tuple[Array, Array],
        held: list[Array],
        passing: list[Array],
        results: list[tuple[int, ...]],
    ) -> list[Array]:
        """Runs a program of `kernel` per held tile and returns float32 arrays of shapes `results`.

        The kernel gets refs to the ends of its range, its tile of each of `held`, its row and head
        of each of `passing`, and its tile of each of `results`.
        """
        batch, heads, tokens = results[0][:3]

        def row_and_tile(index, head, row):
            return row, index

        def tile_of(shape):
            return _spec(shape, tiles.held, lambda index, head, row: (row, head, index))

        def all_of(shape):
            return _spec(shape, shape[2], lambda index, head, row: (row, head, 0))

        def places_of(shape, size, index_of):
            return pl.BlockSpec((None, shape[1], size), index_of)

        return pl.pallas_call(
            partial(kernel, size=tiles.passing),
            grid=(tokens // tiles.held, heads, batch),
            in_specs=[
                *(pl.BlockSpec((None, None), row_and_tile) for _ in stretches),
                places_of(held[0].shape, tiles.held, lambda index, head, row: (row, 0, index)),
                *(tile_of(x.shape) for x in held[1:]),
                places_of(
                    passing[0].shape, passing[0].shape[2], lambda index, head, row: (row, 0, 0)
                ),
                *(all_of(x.shape) for x in passing[1:]),
            ],
            out_specs=[tile_of(shape) for shape in results],
            out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in results],
            compiler_params=triton.CompilerParams(num_warps=tiles.warps, num_stages=2),
            interpret=self.interpret,
            name=kernel.func.__name__.strip("_"),  # type: ignore[attr-defined]
        )(*stretches, *held, *passing)


def check_fused(query_BHSK: Array, key_BHTK: Array) -> None:
    """Checks that the kernels support these arrays.

    Raises:
      UsageError: if they do not.
    """
    width, dtype = query_BHSK.shape[3], query_BHSK.dtype
    elsewhere = "or choose compute.attention = 'blockwise'"
    if dtype not in DTYPES:
        raise UsageError(
            f"fused attention in {dtype}: set compute.dtype to one of {', '.join(DTYPES)}, "
            f"{elsewhere}"
        )
    if width > MAX_WIDTH:
        raise UsageError(
            f"fused attention with heads of width {width}: set model.heads so that "
            f"model.width / model.heads is at most {MAX_WIDTH}, {elsewhere}"
        )
    for x in (query_BHSK, key_BHTK):
        size = math.prod(x.shape[:3]) * _padded_width(width)
        if size > MAX_ELEMENTS:
            raise UsageError(
                f"fused attention over {size} values a device, {MAX_ELEMENTS} at most: shard the "
                f"sequence or the batch over more devices (mesh.*), {elsewhere}"
            )


def _forward_kernel(*refs, size: int, scale: float) -> None:
    first_ref, end_ref, query_places_ref, query_ref, *rest = refs
    key_places_ref, key_ref, value_ref, out_ref, lse_ref = rest
    query = query_ref[...]
    queries = [x[:, None] for x in _rows(query_places_ref, slice(None))]

    def add_tile(index, sums):
        out, top, total = sums
        tile = pl.ds(index * size, size)
        keys = [x[None, :] for x in _rows(key_places_ref, tile)]
        scores = _dot(query, key_ref[tile, :], transposed=1) * (scale * LOG2_E)
        scores = jnp.where(_visible(queries, keys), scores, HIDDEN_SCORE)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        weights = jnp.exp2(scores - new_top[:, None])
        decay = jnp.exp2(top - new_top)
        more = _dot(weights.astype(value_ref.dtype), value_ref[tile, :])
        return out * decay[:, None] + more, new_top, total * decay + jnp.sum(weights, axis=1)

    held = query.shape[0]
    sums = (
        jnp.zeros(query.shape, jnp.float32),
        jnp.full((held,), HIDDEN_SCORE, jnp.float32),
        jnp.zeros((held,), jnp.float32),
    )
    out, top, total = jax.lax.fori_loop(first_ref[...], end_ref[...], add_tile, sums)
    total = jnp.where(total == 0, 1.0, total)  # no tile was visible
    out_ref[...] = out / total[:, None]
    lse_ref[...] = (top + jnp.log2(total)) / LOG2_E


def _query_grad_kernel(*refs, size: int, scale: float) -> None:
    first_ref, end_ref, query_places_ref, query_ref, grad_ref, lse2_ref, delta_ref, *rest = refs
    key_places_ref, key_ref, value_ref, query_grad_ref = rest
    query, grad = query_ref[...], grad_ref[...]
    lse2, delta = lse2_ref[...][:, None], delta_ref[...][:, None]
    queries = [x[:, None] for x in _rows(query_places_ref, slice(None))]

    def add_tile(index, query_grad):
        tile = pl.ds(index * size, size)
        key = key_ref[tile, :]
        keys = [x[None, :] for x in _rows(key_places_ref, tile)]
        scores = _dot(query, key, transposed=1) * (scale * LOG2_E)
        weights = jnp.where(_visible(queries, keys), jnp.exp2(scores - lse2), 0.0)
        score_grad = weights * (_dot(grad, value_ref[tile, :], transposed=1) - delta)
        return query_grad + _dot(score_grad.astype(key.dtype), key)

    zeros = jnp.zeros(query.shape, jnp.float32)
    query_grad = jax.lax.fori_loop(first_ref[...], end_ref[...], add_tile, zeros)
    query_grad_ref[...] = query_grad * scale


def _key_grad_kernel(*refs, size: int, scale: float) -> None:
    """Computes the gradients of keys and values, with scores keys-first to avoid transposes."""
    first_ref, end_ref, key_places_ref, key_ref, value_ref, *rest = refs
    query_places_ref, query_ref, grad_ref, lse2_ref, delta_ref, key_grad_ref, value_grad_ref = rest
    key, value = key_ref[...], value_ref[...]
    keys = [x[:, None] for x in _rows(key_places_ref, slice(None))]

    def add_tile(index, sums):
        key_grad, value_grad = sums
        tile = pl.ds(index * size, size)
        query, grad = query_ref[tile, :], grad_ref[tile, :]
        lse2, delta = lse2_ref[tile][None, :], delta_ref[tile][None, :]
        queries = [x[None, :] for x in _rows(query_places_ref, tile)]
        scores = _dot(key, query, transposed=1) * (scale * LOG2_E)
        weights = jnp.where(_visible(queries, keys), jnp.exp2(scores - lse2), 0.0)
        value_grad += _dot(weights.astype(grad.dtype), grad)
        score_grad = weights * (_dot(value, grad, transposed=1) - delta)
        return key_grad + _dot(score_grad.astype(query.dtype), query), value_grad

    zeros = jnp.zeros(key.shape, jnp.float32)
    sums = jax.lax.fori_loop(first_ref[...], end_ref[...], add_tile, (zeros, zeros))
    key_grad_ref[...] = sums[0] * scale
    value_grad_ref[...] = sums[1]


def _dot(left: Array, right: Array, *, transposed: int = 0) -> Array:
    """Computes left @ right, or left @ right.T if `transposed` is 1, in float32."""
    return jax.lax.dot_general(
        left,
        right,
        (((1,), (transposed,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _rows(places_ref, tile) -> list[Array]:
    """Returns the ids of a tile's tokens, and their blocks if present."""
    return [places_ref[row, tile] for row in range(places_ref.shape[0])]


def _visible(queries: list[Array], keys: list[Array]) -> Array:
    visible = queries[0] == keys[0]
    if len(keys) == 2:
        visible &= keys[1] <= queries[1]
    return visible


def _spec(shape: tuple[int, ...], tokens: int, index_of: Callable) -> pl.BlockSpec:
    """Returns the block spec of an array [B, H, tokens] or [B, H, tokens, K]."""
    width = shape[3:]
    return pl.BlockSpec(
        (None, None, tokens, *width), lambda *program: (*index_of(*program), *(0 for _ in width))
    )


def _places(visibility: Visibility, multiple: int) -> tuple[Array, Array]:
    """Returns padded ids and blocks or ranks, int32 [B, 2, S] and [B, 2, T]."""

    def one(ids: Array, ranks: Array | None) -> Array:
        ids = pad_to_multiple(ids, axis=1, multiple=multiple, value=FILLING)
        if ranks is not None:
            return jnp.stack([ids, pad_to_multiple(ranks, axis=1, multiple=multiple)], axis=1)
        blocks = jnp.zeros_like(ids)
        if visibility.tokens_per_block is not None:
            first = 0 if visibility.first_B is None else visibility.first_B[:, None]
            blocks += (first + jnp.arange(ids.shape[1])) // visibility.tokens_per_block
        return jnp.stack([ids, blocks], axis=1)

    return (
        one(visibility.query_ids_BS, visibility.query_ranks_BS),
        one(visibility.key_ids_BT, visibility.key_ranks_BT),
    )


def _needed(places: Array, visibility: Visibility, tiles: Tiles) -> Array:
    """Drops the blocks if no tile spans several."""
    if visibility.query_ranks_BS is not None:
        return places
    length = visibility.tokens_per_block
    aligned = visibility.first_B is None and length is not None and length % tiles.multiple == 0
    return places[:, :1] if aligned or length is None else places


def _may_see(query_places: Array, key_places: Array, query_tile: int, key_tile: int) -> Array:
    """Returns which tiles may be visible (a superset), bool [B, query tiles, key tiles]."""

    def ends(places: Array, tile: int):
        tiles = places.reshape(*places.shape[:2], -1, tile)
        return tiles.min(-1), tiles.max(-1)

    (low, _), (high, last) = (x.swapaxes(0, 1) for x in ends(query_places, query_tile))
    (key_low, first), (key_high, _) = (x.swapaxes(0, 1) for x in ends(key_places, key_tile))
    same_id = (key_low[:, None] <= high[..., None]) & (low[..., None] <= key_high[:, None])
    return same_id & (first[:, None] <= last[..., None])


def _stretches(visible_BGP: Array) -> tuple[Array, Array]:
    """Returns the first visible tile and one past the last, int32 [B, G] each; empty if none."""
    index, count = jnp.arange(visible_BGP.shape[2]), visible_BGP.shape[2]
    first = jnp.min(jnp.where(visible_BGP, index, count), axis=2)
    return first, jnp.max(jnp.where(visible_BGP, index + 1, 0), axis=2)


def _fitting(tiles: Tiles, dtype: jnp.dtype) -> Tiles:
    if dtype.itemsize < 4:
        return tiles
    return dataclasses.replace(tiles, held=tiles.held // 2, passing=tiles.passing // 2)


def _padded_width(width: int) -> int:
    """Rounds up to a power of two, as Triton requires."""
    return max(MIN_WIDTH, 1 << (width - 1).bit_length())


def _filled(x_BHSK: Array, multiple: int) -> Array:
    """Pads with zeros, which changes no score."""
    x_BHSK = pad_to_multiple(x_BHSK, axis=3, multiple=_padded_width(x_BHSK.shape[3]))
    return pad_to_multiple(x_BHSK, axis=2, multiple=multiple)
