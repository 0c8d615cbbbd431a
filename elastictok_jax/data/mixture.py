"""Which blocks train at which row: a function of (seed, row), computed and never discovered.

Rows are planned in groups of `data.packing_rows`. Each feed is an endless stream of blocks, every
block once an epoch; its weight says which run of that stream a group takes. The runs are packed
into the rows of the group, so that row r costs the same to find, however large r is.
"""

import functools
import threading
from fractions import Fraction

import ml_collections
import numpy as np
from grain.experimental import index_shuffle

from elastictok_jax.data.frame_rate import frames_read, step_between
from elastictok_jax.data.packing import PackedClip, pack
from elastictok_jax.data.sources.splits import SPLITS, SourceSplit
from elastictok_jax.errors import UsageError

MOST_IN_TABLE = 2**20
EPOCHS_KEPT = 2  # orders of a feed that are remembered


def item_blocks(feed: SourceSplit, *, frames_per_block: int) -> np.ndarray:
    """int64 [m]: complete blocks in each item of the feed, at least one."""
    items = feed.items
    frames = frames_read(feed.source.frames[items], frame_step(feed, items))
    return np.maximum(1, frames // frames_per_block)


def frame_step(feed: SourceSplit, items: np.ndarray) -> np.ndarray:
    """float64, shape of `items`: recorded frames from one that is read to the next, 1 or more."""
    return step_between(feed.source.fps[items], feed.settings.fps)


class Stream:
    """The blocks of a feed in training order: each once an epoch, its clips shuffled.

    A clip is an item, or a stretch of at most `longest` blocks of one.

    Attributes:
      blocks: how many an epoch has.
    """

    def __init__(self, items: np.ndarray, counts: np.ndarray, *, longest: int, seed: list[int]):
        pieces = -(-counts // longest)
        self._items = np.repeat(items, pieces)
        first = np.arange(len(self._items)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        self._starts = first * longest
        self._counts = np.minimum(np.repeat(counts, pieces) - self._starts, longest)
        self.blocks = int(self._counts.sum())
        # Of very many single blocks, images, no table is kept; for few it is the quicker way.
        self._hashed = self.blocks > MOST_IN_TABLE and bool((self._counts == 1).all())
        self._seed = seed
        self._orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def take(self, start: int, stop: int, *, feed: int) -> list[PackedClip]:
        """Blocks start, ..., stop - 1 of the endless stream, as clips; cut at both ends."""
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
        """The clip that block `offset` of an epoch lies in, and the clip's blocks before it."""
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
    """The clips of every row of a split.

    Raises:
      UsageError: if a weight is so small that a group of rows holds none of its source.
    """

    def __init__(
        self, feeds: tuple[SourceSplit, ...], config: ml_collections.ConfigDict, *, split: str
    ):
        data, per_block = config.data, config.video.frames_per_block
        self._seed = [config.seed, SPLITS.index(split)]
        self._rows, self._row_blocks = data.packing_rows, data.sequence_blocks
        self._apart = data.packing == "by_source"
        self._feeds = feeds
        self.streams = [
            Stream(
                feed.items,
                item_blocks(feed, frames_per_block=per_block),
                longest=feed.settings.sequences * data.sequence_blocks,
                seed=[*self._seed, feed.seed],
            )
            for feed in feeds
        ]
        weights = [Fraction(feed.settings.weight).limit_denominator(10**6) for feed in feeds]
        shares = [weight / sum(weights) for weight in weights]
        self._edges = [sum(shares[:index], Fraction(0)) for index in range(len(shares) + 1)]
        units = self._rows * (1 if self._apart else self._row_blocks)
        for feed, share in zip(feeds, shares, strict=True):
            if share * units < 1:
                raise UsageError(
                    f"data.sources.{feed.name}.weight = {feed.settings.weight:g} is {share} of "
                    f"all: none of it falls into the {units} {'rows' if self._apart else 'blocks'}"
                    " that are packed together; raise it, or data.packing_rows to at least "
                    f"{-(-self._rows // (share * units))}"
                )
        self._lock = threading.Lock()
        self._group = functools.lru_cache(maxsize=4)(self._plan)

    def row(self, row: int) -> list[PackedClip]:
        """The clips of global row `row`, left to right: `data.sequence_blocks` blocks."""
        group, place = divmod(row, self._rows)
        with self._lock:
            return self._group(group)[place]

    def _plan(self, group: int) -> list[list[PackedClip]]:
        rng = np.random.default_rng([*self._seed, 0xFEED, group])
        rows, row_blocks = self._rows, self._row_blocks
        if not self._apart:
            parts = self._parts(group, units=rows * row_blocks)
            clips = [
                clip
                for index, (start, stop) in enumerate(parts)
                for clip in self.streams[index].take(start, stop, feed=index)
            ]
            return pack(clips, rows=rows, row_blocks=row_blocks, rng=rng)
        queues = []
        for index, (start, stop) in enumerate(self._parts(group, units=rows)):
            blocks = start * row_blocks, stop * row_blocks
            clips = self.streams[index].take(*blocks, feed=index)
            queues.append(pack(clips, rows=stop - start, row_blocks=row_blocks, rng=rng)[::-1])
        turns = np.repeat(np.arange(len(queues)), [len(queue) for queue in queues])
        return [queues[index].pop() for index in rng.permutation(turns)]

    def _parts(self, group: int, *, units: int) -> list[tuple[int, int]]:
        """For each feed, which run of its stream the group takes: `units` in all, by weight.

        Up to time t a feed has had floor(t w1) - floor(t w0) units, with [w0, w1) its part of
        [0, 1]: always within one of its share, and t in all.
        """

        def had(index: int, time: int) -> int:
            low, high = self._edges[index], self._edges[index + 1]
            return time * high.numerator // high.denominator - (
                time * low.numerator // low.denominator
            )

        begin, end = group * units, (group + 1) * units
        return [(had(index, begin), had(index, end)) for index in range(len(self.streams))]

    def __getstate__(self) -> dict:
        state = self.__dict__.copy()
        del state["_lock"], state["_group"]
        return state

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()
        self._group = functools.lru_cache(maxsize=4)(self._plan)
