"""Rows hold the pixels of their clips; every process replaces damaged blocks alike."""

import functools
import operator
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastictok_jax.config import apply_overrides, default_source_config, resolve_config
from elastictok_jax.data import media
from elastictok_jax.data.clip_reader import ClipReader
from elastictok_jax.data.media import MediaError
from elastictok_jax.data.packing import PackedClip
from elastictok_jax.data.sources.file_source import EMBEDDED
from elastictok_jax.data.sources.splits import SourceSplit, SourceSplits, open_splits
from elastictok_jax.experiment_registry import get_experiment
from elastictok_jax.layers.patching import unpatchify
from tests.tiny import block_tokens, reader_of

SIDE, FRAMES = 32, 4


def tiny(**overrides):
    config = get_experiment("quickstart")
    base = {"video.resolution": SIDE, "masking.min_tokens": 1, "data.sequence_blocks": 5}
    apply_overrides(
        config, base | {key.replace("__", "."): value for key, value in overrides.items()}
    )
    return resolve_config(config)


def pixels(row, config) -> np.ndarray:
    sizes = dict(patch=tuple(config.model.patch), height=SIDE, width=SIDE)
    return unpatchify(row["patches"], frames_per_block=FRAMES, **sizes)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_pixels_of_a_row_are_those_of_its_clips(split):
    """Finds unpatchified rows of real footage, frame by frame, in the decoded files."""
    config = tiny(data__sources__main__weight=0.4, data__sources__stills__path="embedded")
    config.data.sources.stills.update(kind="image", weight=0.6)
    feeds = open_splits(config)
    reader = reader_of(config, feeds, split=split)
    per_block, kinds, mirrored, offsets = block_tokens(config), set(), set(), set()
    for number in range(6):
        row = reader.read_row(number)
        video, first = pixels(row, config), 0
        assert row["patches"].dtype == np.uint8 and row["segment_ids"].dtype == np.int32
        for segment, clip in enumerate(reader.mixture.row(number), start=1):
            last = first + clip.blocks
            assert (row["segment_ids"][first * per_block : last * per_block] == segment).all()
            feed = feeds.split(split)[clip.feed]
            flip, left, top = find(
                video[first * FRAMES : last * FRAMES],
                full_item(feed, clip.item),
                clip.start * FRAMES,
            )
            kinds.add(bool(feed.source.is_video[clip.item]))
            mirrored.add(flip)
            offsets.add((left, top))
            first = last
        assert first == 5 and len(video) == 5 * FRAMES
    assert kinds == {True, False}
    assert mirrored == ({True, False} if split == "train" else {False})
    if split == "train":
        assert len(offsets) > 6


def full_item(feed, item) -> np.ndarray:
    name = feed.source.name(item)
    return media.resize_shortest(media.read_frames(EMBEDDED / name), side=SIDE)


def find(clip, frames, start) -> tuple[bool, int, int]:
    """Returns (flipped, left, top) of `clip` as a crop of `frames` from `start` on."""
    if len(frames) == 1:
        frames = np.repeat(frames, len(clip), axis=0)
    part = frames[start : start + len(clip)]
    for top in range(part.shape[1] - SIDE + 1):
        for left in range(part.shape[2] - SIDE + 1):
            cut = part[:, top : top + SIDE, left : left + SIDE]
            for flip in (False, True):
                if (clip == (cut[:, :, ::-1] if flip else cut)).all():
                    return flip, left, top
    raise AssertionError("the clip is nowhere in its file")


class Counted:
    """A source whose frame k of item i is filled with (i, k); some frames cannot be read."""

    fingerprint = "0" * 16

    def __init__(self, frames, damaged=(), fps=24.0):
        self.frames = np.array(frames, np.int64)
        self.is_video = self.frames > 1
        self.fps = np.where(self.is_video, fps, 0.0)
        self.place = np.arange(len(self.frames), dtype=np.uint64)
        self.damaged_frames = set(damaged)
        self.reads = 0

    def name(self, item):
        return f"item{item}"

    def read(self, item, indices, *, side):
        self.reads += 1
        assert (np.diff(indices) > 0).all() and 0 <= indices[0] <= indices[-1] < self.frames[item]
        bad = [(item, int(k)) for k in indices if (item, int(k)) in self.damaged_frames]
        if bad:
            raise MediaError(f"item{item}: frame {bad[0][1]} is damaged")
        out = np.empty((len(indices), side, side, 3), np.uint8)
        out[..., 0], out[..., 1], out[..., 2] = item, indices[:, None, None], 7
        return out


def counted(frames, *, damaged=(), cache_mib=0, fps=24.0, rows=64, **settings):
    source = Counted(frames, damaged, fps=fps)
    settings = {"flip": False} | settings
    feed = SourceSplit(
        "f", 5, source, default_source_config(path="f", **settings), np.arange(len(frames))
    )
    config = tiny(data__cache_mib=cache_mib, data__packing_rows=rows)
    return config, SourceSplits((feed,), (), ()), source


def joined(blocks) -> np.ndarray:
    return np.concatenate([block.frames for block in blocks])


def test_short_videos_and_images_repeat_their_last_frame():
    config, feeds, _ = counted([3, 1])
    reader = ClipReader(feeds.train, config, split="train")
    for item, expected in ((0, [0, 1, 2, 2]), (1, [0, 0, 0, 0])):
        (block,) = reader.read(PackedClip(0, item, 0, 0, 1), range(1))
        assert block.frames[:, 0, 0, 1].tolist() == expected and not block.fault


@given(
    frames=st.integers(1, 80),
    fps=st.sampled_from([0.0, 5.0, 10.0, 24.0, 60.0]),
    split=st.sampled_from(["train", "heldout"]),
    epoch=st.integers(0, 3),
)
def test_frames_of_a_clip_are_evenly_spaced_and_blocks_fit_together(frames, fps, split, epoch):
    config, feeds, _ = counted([frames])
    feeds.train[0].settings.fps = fps
    reader = ClipReader(feeds.train, config, split=split)
    step = max(1.0, 24.0 / fps) if fps else 1.0
    total = max(1, int(np.ceil(frames / step)) // FRAMES)
    clip = PackedClip(0, 0, epoch, 0, total)
    seen = joined(reader.read(clip, range(total)))[:, 0, 0, 1].astype(int)
    pieces = [joined(reader.read(clip, range(b, b + 1)))[:, 0, 0, 1] for b in range(total)]
    assert (np.concatenate(pieces) == seen).all()
    expected = np.floor(np.arange(len(seen)) * step + 0.5)
    assert (np.minimum(expected, frames - 1) == seen).all()


def test_damaged_blocks_are_replaced_whoever_reads_which_part():
    """Items 1 and 2 have damaged frames: 20 % of all blocks."""
    damaged = {(1, 9), (1, 10), (2, 2), (3, 0)}
    config, feeds, _ = counted([16, 16, 16, 2, 16], damaged=damaged)
    whole_reader = reader_of(config, feeds, split="train")
    parts_of_a_row = [0, 1], [2], [3, 4]
    replaced = 0
    for number in range(20):
        row = whole_reader.read_row(number)
        parts = [whole_reader.read_row(number, blocks=part) for part in parts_of_a_row]
        for key in ("patches", "segment_ids"):
            assert (np.concatenate([part[key] for part in parts]) == row[key]).all()
        assert functools.reduce(operator.or_, (part["faults"] for part in parts)) == row["faults"]
        clips = whole_reader.mixture.row(number)
        video = pixels(row, config)[:, 0, 0].astype(int)
        segments = row["segment_ids"][:: block_tokens(config)]
        place = 0
        for segment, clip in enumerate(clips, start=1):
            for block in range(clip.start, clip.start + clip.blocks):
                frames = video[place * FRAMES : (place + 1) * FRAMES]
                bad = any((clip.item, k) in damaged for k in range(4 * block, 4 * block + 4))
                if bad:
                    stand_in = {1: 2, 2: 4, 3: 4}[clip.item]  # the next whose first block is sound
                    stand_in = 4 if (stand_in, 2) in damaged else stand_in
                    assert (frames[:, 0] == stand_in).all() and frames[:, 1].tolist() == [
                        0,
                        1,
                        2,
                        3,
                    ]
                    assert segments[place] == len(clips) + 1 + place  # attends to nothing else
                    replaced += 1
                else:
                    assert (frames[:, 0] == clip.item).all() and segments[place] == segment
                place += 1
        assert len(row["faults"]) == sum(segments > len(clips))
    assert replaced > 10


def test_where_nothing_is_readable_blocks_are_black():
    config, feeds, _ = counted([4] * 3, damaged={(i, k) for i in range(3) for k in range(4)})
    (block,) = ClipReader(feeds.train, config, split="train").read(
        PackedClip(0, 0, 0, 0, 1), range(1)
    )
    assert not block.frames.any() and "item0: frame 0 is damaged" in block.fault


def test_small_sources_are_decoded_once_and_pickle_without_what_is_kept():
    config, feeds, source = counted([16, 8], cache_mib=1)
    reader = ClipReader(feeds.train, config, split="train")
    first = [joined(reader.read(PackedClip(0, item, 0, 0, 1), range(1))) for item in (0, 1, 0, 1)]
    assert source.reads == 2
    again = pickle.loads(pickle.dumps(reader))
    assert (joined(again.read(PackedClip(0, 1, 0, 0, 1), range(1))) == first[1]).all()
    config, feeds, source = counted([16, 10**6], cache_mib=1)
    reader = ClipReader(feeds.train, config, split="train")
    for _ in range(2):
        joined(reader.read(PackedClip(0, 0, 0, 0, 1), range(1)))
    assert source.reads == 2  # the full source does not fit


def test_a_damaged_item_that_would_be_kept_is_decoded_once():
    config, feeds, source = counted([64, 4], damaged={(0, 9)}, cache_mib=1)
    reader = ClipReader(feeds.train, config, split="train")
    blocks = list(reader.read(PackedClip(0, 0, 0, 0, 16), range(16)))
    assert len(blocks) == 16 and all("item0: frame 9 is damaged" in b.fault for b in blocks)
    assert source.reads == 2  # the item, and the one in its place


def test_while_an_item_is_decoded_others_are_read_and_the_same_one_is_waited_for():
    config, feeds, source = counted([8, 8], cache_mib=1)
    began, release, read = threading.Event(), threading.Event(), source.read

    def slow_at_first_item(item, indices, *, side):
        if item == 0:
            began.set()
            assert release.wait(10)
        return read(item, indices, side=side)

    source.read = slow_at_first_item
    reader = ClipReader(feeds.train, config, split="train")

    def block(item):
        return joined(reader.read(PackedClip(0, item, 0, 0, 1), [0]))[0, 0, 0, 0]

    with ThreadPoolExecutor(3) as pool:
        slow = [pool.submit(block, 0)]
        assert began.wait(10)
        slow.append(pool.submit(block, 0))
        try:
            assert pool.submit(block, 1).result(timeout=10) == 1
            assert not any(future.done() for future in slow)
        finally:
            release.set()
        assert [future.result() for future in slow] == [0, 0]
    assert source.reads == 2


def test_held_out_blocks_take_nothing_of_the_memory_for_training_data():
    config, feeds, source = counted([16, 8], cache_mib=1)
    reader = ClipReader(feeds.train, config, split="heldout")
    for _ in range(2):
        assert len(joined(reader.read(PackedClip(0, 0, 0, 0, 1), [0]))) == FRAMES
    assert source.reads == 2  # once each time: nothing is kept


def test_resolution_above_the_crop_and_centre_crops():
    config = tiny(data__sources__main__resolution=48, data__sources__main__crop="center")
    feeds = open_splits(config)
    reader = ClipReader(feeds.train, config, split="train")
    (feed,) = feeds.train
    item = int(feed.items[feed.source.is_video[feed.items]][0])
    seen = joined(reader.read(PackedClip(0, item, 0, 0, 1), range(1)))
    name = feed.source.name(item)
    big = media.resize_shortest(media.read_frames(EMBEDDED / name, count=8), side=48)
    _, height, width, _ = big.shape
    top, left = round((height - SIDE) / 2), round((width - SIDE) / 2)
    cut = big[:, top : top + SIDE, left : left + SIDE]
    assert any((seen == version[:4]).all() for version in (cut, cut[:, :, ::-1]))
