"""What clips a row is packed with, and that the pixels of the row are those clips'."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from elastictok_jax.config import block_tokens, override, resolve
from elastictok_jax.data import media
from elastictok_jax.data.packing import pack_row
from elastictok_jax.data.pipeline import BatchReader
from elastictok_jax.data.sources import Source
from elastictok_jax.models.patching import unpatchify
from elastictok_jax.registry import get_experiment

SIDE, FRAMES = 32, 4


def tiny(**overrides):
    config = get_experiment("quickstart")
    base = {"video.resolution": SIDE, "masking.min_tokens": 1, "data.sequence_blocks": 5}
    override(config, base | {key.replace("__", "."): value for key, value in overrides.items()})
    return resolve(config)


def image_info(name: str) -> media.MediaInfo:
    return media.MediaInfo(name, "image", 1, 0.0, 40, 60)


def video_info(name: str, frames: int) -> media.MediaInfo:
    return media.MediaInfo(name, "video", frames, 24.0, 40, 60)


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), max_size=4),
    images=st.integers(0, 3),
    shape=st.tuples(st.integers(1, 9), st.floats(0, 1)),
    row=st.integers(0, 2**40),
    split=st.sampled_from(["train", "heldout"]),
)
def test_rows_are_filled_exactly(lengths, images, shape, row, split):
    assume(lengths or images)
    blocks, image_weight = shape
    source = Source(
        images=tuple(image_info(f"i{n}") for n in range(images)),
        videos=tuple(video_info(f"v{n}", length) for n, length in enumerate(lengths)),
    )
    config = tiny(data__sequence_blocks=blocks, data__image_weight=image_weight)
    clips = pack_row(source, row, split=split, config=config)
    assert clips == pack_row(source, row, split=split, config=config)
    assert sum(clip.blocks for clip in clips) == blocks
    left = blocks
    for clip in clips:
        assert clip.info in source.images + source.videos
        assert clip.blocks >= 1
        if clip.info.kind == "image":
            assert (clip.blocks, clip.start) == (1, 0)
        elif clip.info.frames >= FRAMES:
            assert clip.blocks == min(left, clip.info.frames // FRAMES)
            assert 0 <= clip.start <= clip.info.frames - clip.blocks * FRAMES
        else:
            assert (clip.blocks, clip.start) == (1, 0)
        if split == "heldout":
            assert (clip.across, clip.down, clip.flip) == (0.5, 0.5, False)
        assert 0 <= clip.across <= 1 and 0 <= clip.down <= 1
        left -= clip.blocks


def test_images_come_as_often_as_asked_for():
    source = Source(images=(image_info("i"),), videos=(video_info("v", 4),))
    for weight in (0.0, 0.3, 1.0):
        config = tiny(data__image_weight=weight)
        clips = [
            c for row in range(200) for c in pack_row(source, row, split="train", config=config)
        ]
        share = np.mean([clip.info.kind == "image" for clip in clips])
        assert share == pytest.approx(weight, abs=0.06 if 0 < weight < 1 else 0)


def test_training_rows_vary_and_seeds_and_splits_differ():
    source = Source(images=(image_info("i"),), videos=(video_info("v", 60),))
    rows = [pack_row(source, row, split="train", config=tiny()) for row in range(50)]
    clips = [clip for row in rows for clip in row]
    assert {clip.flip for clip in clips} == {True, False}
    assert len({(clip.across, clip.down) for clip in clips}) == len(clips)
    assert len({clip.start for clip in clips if clip.info.kind == "video"}) > 10
    assert rows != [pack_row(source, row, split="train", config=tiny(seed=1)) for row in range(50)]
    unflipped = tiny(data__flip=False)
    for row in range(50):
        assert not any(c.flip for c in pack_row(source, row, split="train", config=unflipped))


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_pixels_of_a_row_are_those_of_its_clips(split):
    """Un-patchified rows of real footage against frames read one by one from the files."""
    config = tiny(data__image_weight=0.6)
    reader = BatchReader(config, split=split, rows=range(1))
    per_block, kinds, flips = block_tokens(config), set(), set()
    for number in range(6):
        row = reader.read_row(number)
        video = unpatchify(
            row["patches"],
            patch=tuple(config.model.patch),
            frames_per_block=FRAMES,
            height=SIDE,
            width=SIDE,
        )
        clips = pack_row(reader.source, number, split=split, config=config)
        assert row["patches"].dtype == np.uint8 and row["segment_ids"].dtype == np.int32
        first = 0
        for segment, clip in enumerate(clips, start=1):
            last = first + clip.blocks
            segments = row["segment_ids"][first * per_block : last * per_block]
            assert (segments == segment).all()
            np.testing.assert_array_equal(
                video[first * FRAMES : last * FRAMES], expected_pixels(clip, split)
            )
            kinds.add(clip.info.kind)
            flips.add(clip.flip)
            first = last
        assert first == 5 and len(video) == 5 * FRAMES
    assert kinds == {"image", "video"}
    assert flips == ({True, False} if split == "train" else {False})


def expected_pixels(clip, split: str) -> np.ndarray:
    wanted = clip.blocks * FRAMES
    if clip.info.kind == "image":
        frames = np.stack([media.read_image(clip.info.path)] * wanted)
    else:
        whole = media.read_frames(clip.info.path)
        frames = whole[clip.start : clip.start + wanted]
    frames = media.resize_shortest(frames, side=SIDE)
    height, width = frames.shape[1:3]
    assert min(height, width) == SIDE
    top, left = round(clip.down * (height - SIDE)), round(clip.across * (width - SIDE))
    if split == "heldout":
        assert abs(top - (height - SIDE) / 2) <= 0.5 and abs(left - (width - SIDE) / 2) <= 0.5
    frames = frames[:, top : top + SIDE, left : left + SIDE]
    return frames[:, :, ::-1] if clip.flip else frames


def test_video_shorter_than_a_block_repeats_its_last_frame(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), dtype=np.uint8)
    media.write_video(tmp_path / "short.mkv", frames, fps=10, codec="ffv1")
    config = tiny(data__source=str(tmp_path), data__eval_fraction=0.0, data__flip=False)
    row = BatchReader(config, split="train", rows=range(1)).read_row(0)
    video = unpatchify(
        row["patches"],
        patch=tuple(config.model.patch),
        frames_per_block=FRAMES,
        height=SIDE,
        width=SIDE,
    )
    for block in range(5):
        clip = video[block * FRAMES : (block + 1) * FRAMES]
        np.testing.assert_array_equal(clip, frames[[0, 1, 2, 2]])
    assert set(row["segment_ids"]) == {1, 2, 3, 4, 5}
