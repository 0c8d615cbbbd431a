"""Computes which blocks train in which row, as a function of (seed, row) alone.

Rows are planned in groups of `data.packing_rows`. Each source split is an endless stream of blocks,
every block once an epoch; its weight decides which run of that stream a group takes. The runs are
packed into the rows of the group, so that finding row r costs the same for any r.
"""

import functools
import threading
from fractions import Fraction

import ml_collections
import numpy as np
from grain.experimental import index_shuffle

from elastictok_jax.data.frame_rate import count_frames_at_rate, frame_rate_step
from elastictok_jax.data.packing import PackedClip, pack_clips
from elastictok_jax.data.sources.splits import SPLITS, SourceSplit
from elastictok_jax.errors import UsageError

MOST_IN_TABLE = 2**20
EPOCHS_KEPT = 2  # cached orders of a stream


def mixture_item_blocks(feed: SourceSplit, *, frames_per_block: int) -> np.ndarray:
    """Returns the number of complete blocks in each item, at least one: int64 [m]."""
    items = feed.items
    frames = count_frames_at_rate(feed.source.frames[items], mixture_frame_step(feed, items))
    return np.maximum(1, frames // frames_per_block)


def mixture_frame_step(feed: SourceSplit, items: np.ndarray) -> np.ndarray:
    """Returns the step between frames to read, in recorded frames: float64 >= 1, as `items`."""
    return frame_rate_step(feed.source.fps[items], feed.settings.fps)


class Stream:
    """The blocks of a source split in training order: each once an epoch, clips shuffled.

    A clip is an item, or a stretch of at most `longest` blocks of one.

    Attributes:
      blocks: number of blocks in an epoch.
    """

    def __init__(self, items: np.ndarray, counts: np.ndarray, *, longest: int, seed: list[int]):
        pieces = -(-counts // longest)
        self._items = np.repeat(items, pieces)
        first = np.arange(len(self._items)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        self._starts = first * longest
        self._counts = np.minimum(np.repeat(counts, pieces) - self._starts, longest)
        self.blocks = int(self._counts.sum())
        # For very many single blocks (images), no table is kept; for few a table is faster.
        self._hashed = self.blocks > MOST_IN_TABLE and bool((self._counts == 1).all())
        self._seed = seed
        self._orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def take(self, start: int, stop: int, *, feed: int) -> list[PackedClip]:
        """Returns blocks start, ..., stop - 1 of the endless stream as clips, cut at both ends."""
        clips = []
        while start < stop:
            epoch, offset = divmod(start, self.blocks)
            clip, skipped = self._find(epoch, offset)
            blocks = min(int(self._counts[clip]) - skipped, stop - start)
            first = int(self._starts[clip]) + skipped
            clips.append(PackedClip(feed, int(self._items[clip]), epoch, first, blocks))
            start += blocks
        return clips

    def _find(self, epoch: int, offset: int) -> tuple[int, int]:
        """Finds the clip of block `offset` of an epoch, and the number of its blocks before it."""
        if self._hashed:
            seed = int(np.random.default_rng([*self._seed, epoch]).integers(2**32))
            return index_shuffle(offset, max_index=self.blocks - 1, seed=seed, rounds=4), 0
        if epoch not in self._orders:
            rng = np.random.default_rng([*self._seed, epoch])
            order = rng.permutation(len(self._counts))
            while len(self._orders) >= EPOCHS_KEPT:
                del self._orders[next(iter(self._orders))]
            self._orders[epoch] = order, np.cumsum(self._counts[order])
        order, ends = self._orders[epoch]
        place = int(np.searchsorted(ends, offset, side="right"))
        return int(order[place]), offset - int(ends[place] - self._counts[order[place]])


class Mixture:
    """Computes the clips of every row of a split.

    Raises:
      UsageError: if a weight is so small that a group of rows holds none of its source.
    """

    def __init__(
        self, feeds: tuple[SourceSplit, ...], config: ml_collections.ConfigDict, *, split: str
    ):
        data, per_block = config.data, config.video.frames_per_block
        self._seed = [config.seed, SPLITS.index(split)]
        self._rows, self._row_blocks = data.packing_rows, data.sequence_blocks
        self._by_source = data.packing == "by_source"
        self._feeds = feeds
        self.streams = [
            Stream(
                feed.items,
                mixture_item_blocks(feed, frames_per_block=per_block),
                longest=feed.settings.sequences * data.sequence_blocks,
                seed=[*self._seed, feed.seed],
            )
            for feed in feeds
        ]
        weights = [Fraction(feed.settings.weight).limit_denominator(10**6) for feed in feeds]
        fractions = [weight / sum(weights) for weight in weights]
        self._edges = [sum(fractions[:index], Fraction(0)) for index in range(len(fractions) + 1)]
        units = self._rows * (1 if self._by_source else self._row_blocks)
        for feed, fraction in zip(feeds, fractions, strict=True):
            if fraction * units < 1:
                raise UsageError(
                    f"data.sources.{feed.name}.weight = {feed.settings.weight:g} is {fraction} of "
                    f"all: none of it falls into the {units} "
                    f"{'rows' if self._by_source else 'blocks'} that are packed together; raise "
                    f"it, or data.packing_rows to at least {-(-self._rows // (fraction * units))}"
                )
        self._lock = threading.Lock()
        self._group = functools.lru_cache(maxsize=4)(self._plan)

    def row(self, row: int) -> list[PackedClip]:
        """Returns the clips of global row `row` in order: `data.sequence_blocks` blocks."""
        group, place = divmod(row, self._rows)
        with self._lock:
            return self._group(group)[place]

    def _plan(self, group: int) -> list[list[PackedClip]]:
        rng = np.random.default_rng([*self._seed, 0xFEED, group])
        rows, row_blocks = self._rows, self._row_blocks
        if not self._by_source:
            parts = self._parts(group, units=rows * row_blocks)
            clips = [
                clip
                for index, (start, stop) in enumerate(parts)
                for clip in self.streams[index].take(start, stop, feed=index)
            ]
            return pack_clips(clips, rows=rows, row_blocks=row_blocks, rng=rng)
        queues = []
        for index, (start, stop) in enumerate(self._parts(group, units=rows)):
            blocks = start * row_blocks, stop * row_blocks
            clips = self.streams[index].take(*blocks, feed=index)
            queues.append(
                pack_clips(clips, rows=stop - start, row_blocks=row_blocks, rng=rng)[::-1]
            )
        turns = np.repeat(np.arange(len(queues)), [len(queue) for queue in queues])
        return [queues[index].pop() for index in rng.permutation(turns)]

    def _parts(self, group: int, *, units: int) -> list[tuple[int, int]]:
        """Returns the run [start, stop) of each stream that a group takes: `units` in total.

        Up to time t a stream has given floor(t w1) - floor(t w0) units, with [w0, w1) its part of
        [0, 1]: always within one of t (w1 - w0), and t in total.
        """

        def taken(index: int, time: int) -> int:
            low, high = self._edges[index], self._edges[index + 1]
            return time * high.numerator // high.denominator - (
                time * low.numerator // low.denominator
            )

        begin, end = group * units, (group + 1) * units
        return [(taken(index, begin), taken(index, end)) for index in range(len(self.streams))]

    def __getstate__(self) -> dict:
        state = self.__dict__.copy()
        del state["_lock"], state["_group"]
        return state

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()
        self._group = functools.lru_cache(maxsize=4)(self._plan)
