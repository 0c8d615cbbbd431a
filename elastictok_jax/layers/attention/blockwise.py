"""Tiled attention in plain XLA, with memory linear in the sequence length.

Dimension key: B batch, S queries, T keys, H heads, K head width.
"""

import bisect
import collections
import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from elastictok_jax.layers.attention.kernel import HIDDEN_SCORE, Visibility
from elastictok_jax.layers.attention.tile import (
    Stretch,
    merge_softmax,
    output_dot_gradient,
    tile_backward,
    tile_forward,
    tile_mask,
)

# Maximum queries and keys per tile: its scores should fit a core's cache (measured on CPU).
QUERIES, KEYS = 512, 1024
# Tiles with fewer queries cost more than the hidden scores they avoid.
MIN_QUERIES = 64


@dataclasses.dataclass(frozen=True)
class BlockwiseKernel:
    """Online softmax over tiles of at most `queries` x `keys` scores per head.

    Tiles hidden by the block mask are skipped. The backward pass recomputes the scores of a tile.
    """

    queries: int = QUERIES
    keys: int = KEYS

    def forward(self, query_BHSK, key_BHTK, value_BHTK, visibility):
        """As `Kernel.forward`."""
        tiles = blockwise_visible_tiles(self, query_BHSK.shape[2], key_BHTK.shape[2], visibility)
        out_BHSK = jnp.zeros(query_BHSK.shape, jnp.float32)
        lse_BHS = jnp.full(query_BHSK.shape[:3], HIDDEN_SCORE, jnp.float32)

        def add_tile(sums, queries, keys, visibility):
            out, lse = sums
            part = tile_forward(
                queries.of(query_BHSK),
                keys.of(key_BHTK),
                keys.of(value_BHTK),
                tile_mask(visibility, queries, keys),
            )
            out_tile, lse_tile = merge_softmax(queries.of(out), queries.of(lse), *part)
            return queries.put(out, out_tile), queries.put(lse, lse_tile)

        return _for_each_tile(add_tile, (out_BHSK, lse_BHS), tiles, visibility)

    def backward(
        self, query_BHSK, key_BHTK, value_BHTK, visibility, *, out_BHSK, lse_BHS, grad_BHSK
    ):
        """As `Kernel.backward`."""
        tiles = blockwise_visible_tiles(self, query_BHSK.shape[2], key_BHTK.shape[2], visibility)
        delta_BHS = output_dot_gradient(out_BHSK, grad_BHSK)
        grad_BHSK = grad_BHSK.astype(value_BHTK.dtype)

        def add_tile(sums, queries, keys, visibility):
            grads = tile_backward(
                queries.of(query_BHSK),
                keys.of(key_BHTK),
                keys.of(value_BHTK),
                tile_mask(visibility, queries, keys),
                lse_BHS=queries.of(lse_BHS),
                grad_BHSK=queries.of(grad_BHSK),
                delta_BHS=queries.of(delta_BHS),
            )
            places = (queries, keys, keys)
            return tuple(
                place.put(total, place.of(total) + grad)
                for place, total, grad in zip(places, sums, grads, strict=True)
            )

        inputs = (query_BHSK, key_BHTK, value_BHTK)
        zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in inputs)
        return _for_each_tile(add_tile, zeros, tiles, visibility)


def blockwise_visible_tiles(
    kernel: BlockwiseKernel, queries: int, keys: int, visibility: Visibility
) -> list[tuple[range, range]]:
    """Returns tiles that cover all that the block mask leaves visible, sized as `kernel` allows."""
    length = visibility.tokens_per_block
    if length is None or visibility.first_B is not None:
        size = kernel.queries
    elif length <= kernel.queries:
        size = length * math.ceil(MIN_QUERIES / length)
    else:
        divisors = [n for n in range(MIN_QUERIES, kernel.queries + 1) if length % n == 0]
        size = max(divisors, default=kernel.queries)
    tiles = []
    for start in range(0, queries, size):
        rows = range(start, min(start + size, queries))

        def hidden(key: int, rows: range = rows) -> bool:
            return visibility.blocks_hide_all(rows, range(key, key + 1))

        end = bisect.bisect_left(range(keys), True, key=hidden)  # keys from `end` are hidden
        columns = range(0, end, kernel.keys)
        tiles += [(rows, range(k, min(k + kernel.keys, end))) for k in columns]
    return tiles


def _for_each_tile(add_tile: Callable, sums, tiles: list[tuple[range, range]], visibility):
    """Folds `sums = add_tile(sums, queries, keys, visibility)` over tiles, one loop per shape."""
    groups = collections.defaultdict(list)
    for queries, keys in tiles:
        masked = visibility.blocks_hide(queries, keys)
        groups[len(queries), len(keys), masked].append((queries.start, keys.start))
    for (rows, columns, masked), starts in groups.items():
        seen = (
            visibility
            if masked
            else dataclasses.replace(visibility, tokens_per_block=None, first_B=None)
        )

        def step(sums, start, rows=rows, columns=columns, seen=seen):
            stretches = (Stretch(start[0], rows), Stretch(start[1], columns))
            return add_tile(sums, *stretches, seen), None

        if len(starts) == 1:
            sums, _ = step(sums, starts[0])  # with a static start
        else:
            sums, _ = jax.lax.scan(step, sums, jnp.asarray(starts, jnp.int32))
    return sums
