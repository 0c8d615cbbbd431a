"""Which blocks train in which row: exact fractions, exact epochs, random access to rows."""

import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastictok_jax.config import apply_overrides, default_source_config, resolve_config
from elastictok_jax.data.mixture import Mixture, Stream, mixture_item_blocks
from elastictok_jax.data.sources.base import name_hash
from elastictok_jax.data.sources.splits import SourceSplit
from elastictok_jax.errors import UsageError
from elastictok_jax.experiment_registry import get_experiment

FRAMES = 4


class Lengths:
    """A source of item lengths alone; these tests read no pixels."""

    def __init__(self, frames, fps=24.0):
        self.frames = np.array(frames, np.int64)
        self.is_video = self.frames > 1
        self.fps = np.where(self.is_video, fps, 0.0)


def feed(name, frames, **settings):
    source = Lengths(frames)
    items = np.arange(len(source.frames))
    return SourceSplit(
        name, name_hash(name), source, default_source_config(path=name, **settings), items
    )


def config_for(**overrides):
    config = get_experiment("quickstart")
    apply_overrides(config, {key.replace("__", "."): value for key, value in overrides.items()})
    return resolve_config(config)


def mixture(*feeds, **overrides):
    return Mixture(feeds, config_for(**overrides), split="train")


def blocks_of(rows):
    return Counter(
        (clip.feed, clip.epoch, clip.item, block)
        for row in rows
        for clip in row
        for block in range(clip.start, clip.start + clip.blocks)
    )


@settings(max_examples=50)
@given(
    frames=st.lists(st.integers(1, 200), min_size=1, max_size=12),
    sequences=st.integers(1, 3),
    blocks=st.integers(1, 5),
    seed=st.integers(0, 5),
)
def test_every_block_comes_exactly_once_an_epoch(frames, sequences, blocks, seed):
    only = feed("a", frames, sequences=sequences)
    counts = mixture_item_blocks(only, frames_per_block=FRAMES)
    assert counts.tolist() == [max(1, n // FRAMES) for n in frames]
    plan = mixture(only, data__sequence_blocks=blocks, data__packing_rows=3, seed=seed)
    total = int(counts.sum())
    rows = -(-2 * total // blocks)
    seen = blocks_of(plan.row(row) for row in range(3 * -(-rows // 3)))
    assert max(seen.values()) == 1
    for epoch in range(2):
        expected = {(0, epoch, item, b) for item, n in enumerate(counts) for b in range(n)}
        assert expected <= seen.keys()


@settings(max_examples=30)
@given(
    weights=st.lists(st.floats(0.05, 1.0), min_size=1, max_size=4),
    packing=st.sampled_from(["mixed", "by_source"]),
    groups=st.integers(1, 6),
)
def test_weights_are_shares_of_the_blocks(weights, packing, groups):
    feeds = [feed(str(n), [1, 9, 30, 77], weight=w) for n, w in enumerate(weights)]
    plan = mixture(*feeds, data__packing=packing, data__packing_rows=200)
    rows = [plan.row(row) for row in range(200 * groups)]
    assert all(sum(clip.blocks for clip in row) == 4 for row in rows)
    count = Counter()
    for (index, *_), times in blocks_of(rows).items():
        count[index] += times
    unit = 4 if packing == "by_source" else 1
    for index, weight in enumerate(weights):
        assert abs(count[index] - weight / sum(weights) * len(rows) * 4) < 2 * unit
    if packing == "by_source":
        assert all(len({clip.feed for clip in row}) == 1 for row in rows)


def test_rows_are_the_same_in_any_order_and_after_pickling():
    feeds = [feed("a", [1] * 50, weight=0.3), feed("b", [5, 900, 33, 60], weight=0.7)]
    plan = mixture(*feeds)
    rows = {row: plan.row(row) for row in (0, 1, 63, 64, 700, 123_456_789_012)}
    again = pickle.loads(pickle.dumps(mixture(*feeds)))
    assert {row: again.row(row) for row in reversed(rows)} == rows
    assert all(sum(clip.blocks for clip in row) == 4 for row in rows.values())


def test_another_source_leaves_the_order_of_the_first_as_it_is():
    def order(plan, name_index):
        clips = [c for row in range(256) for c in plan.row(row) if c.feed == name_index]
        return {(c.epoch, c.item) for c in clips}

    first = feed("b", [1] * 1000, weight=1.0)
    alone = order(mixture(first), 0)
    both = order(mixture(feed("a", [40] * 9, weight=1.0), first), 1)
    assert both < alone and len(both) == len(alone) / 2


def test_seeds_splits_and_epochs_differ():
    images = feed("a", [1] * 64)
    first = [c.item for row in range(16) for c in mixture(images).row(row)]
    second = [c.item for row in range(16, 32) for c in mixture(images).row(row)]
    other = [c.item for row in range(16) for c in mixture(images, seed=1).row(row)]
    held = Mixture((images,), config_for(), split="heldout")
    held_first = [c.item for row in range(16) for c in held.row(row)]
    orders = [first, second, other, held_first]
    assert len({tuple(order) for order in orders}) == 4


def test_a_long_video_fills_rows_in_order():
    plan = mixture(feed("film", [4 * 160], sequences=40), data__packing_rows=40)
    starts = [clip.start for row in range(40) for clip in plan.row(row)]
    assert starts == list(range(0, 160, 4))


def test_sequences_cuts_a_long_video_into_stretches_that_are_shuffled():
    plan = mixture(feed("film", [4 * 160], sequences=2), data__packing_rows=40)
    clips = [clip for row in range(40) for clip in plan.row(row)]
    starts = [clip.start for clip in clips]
    assert sorted(starts) == list(range(0, 160, 4)) and starts != sorted(starts)
    for start in range(0, 160, 8):
        assert starts.index(start) < starts.index(start + 4)


def test_frame_rate_decides_how_many_blocks_there_are():
    assert mixture_item_blocks(feed("a", [240, 1], fps=6.0), frames_per_block=4).tolist() == [15, 1]
    assert mixture_item_blocks(feed("a", [240], fps=60.0), frames_per_block=4).tolist() == [60]


def test_a_weight_too_small_to_ever_come_is_refused():
    feeds = (feed("a", [9]), feed("b", [9], weight=0.001))
    with pytest.raises(UsageError, match=r"data\.sources\.b\.weight = 0\.001 .*packing_rows") as e:
        mixture(*feeds)
    least = int(str(e.value).split()[-1])
    mixture(*feeds, data__packing_rows=least)
    with pytest.raises(UsageError):
        mixture(*feeds, data__packing_rows=least - 1)


def test_many_images_are_shuffled_without_a_table():
    count = 2**20 + 7
    stream = Stream(np.arange(count), np.ones(count, int), longest=4, seed=[0])
    for start in (0, 5 * count - 3):
        clips = stream.take(start, start + 2000, feed=0)
        assert len({(clip.epoch, clip.item) for clip in clips}) == 2000
        assert not stream._orders
    found = [stream._find(3, offset)[0] for offset in range(0, count, 97)]
    assert len(set(found)) == len(found)


def test_a_million_videos_are_planned_without_going_through_them():
    """A distant row costs the table of one epoch, not all epochs before it."""
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 50, 10**6)
    stream = Stream(np.arange(10**6), counts, longest=64, seed=[0])
    far = 10**9 * stream.blocks + 12345
    clips = stream.take(far, far + 100, feed=0)
    assert sum(clip.blocks for clip in clips) == 100
    assert {clip.epoch for clip in clips} == {10**9}
