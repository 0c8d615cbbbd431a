"""Batch k is a function of (seed, k), whoever reads it, from wherever, with whatever threads."""

import tracemalloc

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from elastictok_jax.config import override, resolve, sequence_tokens
from elastictok_jax.data import media
from elastictok_jax.data.pipeline import BatchReader, local_rows, read_ahead, to_device
from elastictok_jax.errors import UsageError
from elastictok_jax.registry import get_experiment

BATCHES, ROWS = 6, 4


def tiny(**overrides):
    config = get_experiment("quickstart")
    base = {
        "video.resolution": 16,
        "masking.min_tokens": 1,
        "data.batch_size": ROWS,
        "data.sequence_blocks": 3,
        "data.image_weight": 0.4,
    }
    override(config, base | {key.replace("__", "."): value for key, value in overrides.items()})
    return resolve(config)


def stack(batches) -> list[tuple[bytes, bytes]]:
    return [(batch["patches"].tobytes(), batch["segment_ids"].tobytes()) for batch in batches]


@pytest.fixture(scope="module")
def from_the_start():
    reader = BatchReader(tiny(), split="train", rows=range(ROWS))
    return list(read_ahead(reader, start=0, stop=BATCHES))


def test_shapes_and_types(from_the_start):
    config = tiny()
    assert len(from_the_start) == BATCHES
    for batch in from_the_start:
        assert batch.keys() == {"patches", "segment_ids"}
        assert batch["patches"].shape == (ROWS, sequence_tokens(config), 2 * 8 * 8 * 3)
        assert batch["patches"].dtype == np.uint8
        assert batch["segment_ids"].shape == (ROWS, sequence_tokens(config))
        assert batch["segment_ids"].dtype == np.int32
        assert batch["segment_ids"].min() >= 1
    rows = {row.tobytes() for batch in from_the_start for row in batch["patches"]}
    assert len(rows) == BATCHES * ROWS  # no row comes twice


@pytest.mark.parametrize(("threads", "start"), [(1, 0), (4, 0), (1, 3), (3, 5)])
def test_neither_start_nor_threads_matter(from_the_start, threads, start):
    config = tiny(data__decode_threads=threads, data__prefetch=1 + threads)
    reader = BatchReader(config, split="train", rows=range(ROWS))
    batches = list(read_ahead(reader, start=start, stop=BATCHES))
    assert stack(batches) == stack(from_the_start[start:])
    # In whatever order, too.
    assert stack([reader(4), reader(1), reader(4)]) == stack(from_the_start[k] for k in (4, 1, 4))


def test_rows_of_two_processes_make_the_whole_batch(from_the_start):
    halves = [
        list(read_ahead(BatchReader(tiny(), split="train", rows=rows), start=0, stop=BATCHES))
        for rows in (range(2), range(2, 4))
    ]
    for whole, upper, lower in zip(from_the_start, *halves, strict=True):
        for key, value in whole.items():
            np.testing.assert_array_equal(np.concatenate([upper[key], lower[key]]), value)


def test_batch_size_moves_no_row(from_the_start):
    """Row r of the run is the same in batches of 4 and of 2."""
    reader = BatchReader(tiny(data__batch_size=2), split="train", rows=range(2))
    for index in range(4):
        whole = from_the_start[index // 2]["patches"]
        half = whole[2 * (index % 2) : 2 * (index % 2) + 2]
        np.testing.assert_array_equal(reader(index)["patches"], half)


def test_another_seed_and_the_other_split_give_other_data(from_the_start):
    first = from_the_start[0]["patches"]
    for config, split in ((tiny(seed=1), "train"), (tiny(), "heldout")):
        other = BatchReader(config, split=split, rows=range(ROWS))(0)["patches"]
        assert not any((row == mate).all() for row, mate in zip(first, other, strict=True))


def test_heldout_rows_are_not_flipped_or_cropped_at_random(tmp_path):
    """One wide picture for both splits: held-out rows are its middle, training rows are not."""
    picture = np.random.default_rng(0).integers(0, 256, (16, 48, 3), dtype=np.uint8)
    for name in range(6):  # the same content under names that fall on both sides
        media.write_image(tmp_path / f"{name}.png", picture)
    config = tiny(data__source=str(tmp_path), data__eval_fraction=0.5)
    middle = picture[:, 16:32]
    rows = {}
    for split in ("train", "heldout"):
        batch = BatchReader(config, split=split, rows=range(ROWS))(0)
        first = batch["patches"][:, :4].reshape(ROWS, 2, 2, 2, 8, 8, 3)[:, :, :, 0]
        rows[split] = first.transpose(0, 1, 3, 2, 4, 5).reshape(ROWS, 16, 16, 3)
    for row in rows["heldout"]:
        np.testing.assert_array_equal(row, middle)
    assert len({row.tobytes() for row in rows["train"]}) > 1
    assert not all((row == middle).all() for row in rows["train"])


def test_no_heldout_file_is_said(tmp_path):
    media.write_image(tmp_path / "only.png", np.zeros((16, 16, 3), np.uint8))
    config = tiny(data__source=str(tmp_path))
    with pytest.raises(UsageError, match=r"has no heldout files: .*data\.eval_fraction = 0\.1"):
        BatchReader(config, split="heldout", rows=range(1))


def test_damaged_file_is_named_when_read(tmp_path):
    """A video cut short after it was probed stops the reader with its name; it never hangs."""
    frames = np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3), dtype=np.uint8)
    path = tmp_path / "clip.mp4"
    media.write_video(path, frames, fps=10)
    config = tiny(data__source=str(tmp_path), data__eval_fraction=0.0)
    reader = BatchReader(config, split="train", rows=range(ROWS))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UsageError, match=r"clip\.mp4"):
        list(read_ahead(reader, start=0, stop=2))


def test_to_device_places_the_rows_of_this_process(from_the_start):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    assert local_rows(sharding, 6) == range(6)
    placed = to_device(from_the_start[0], sharding)
    for key, value in from_the_start[0].items():
        assert placed[key].sharding == sharding
        np.testing.assert_array_equal(placed[key], value)


def test_what_is_kept_in_memory_changes_nothing(from_the_start):
    for cache_mib in (0, 1):  # nothing fits; some files do
        reader = BatchReader(tiny(data__cache_mib=cache_mib), split="train", rows=range(ROWS))
        assert stack([reader(k) for k in range(2)]) == stack(from_the_start[:2])


def test_first_row_moves_the_whole_sequence_of_batches(from_the_start):
    reader = BatchReader(tiny(), split="train", rows=range(ROWS), first_row=2 * ROWS)
    assert stack([reader(0), reader(1)]) == stack(from_the_start[2:4])


def test_a_large_video_is_resized_in_pieces(tmp_path):
    """Decoding to keep in memory never holds a whole clip at its full size."""
    side, frames = 720, 160
    video = np.zeros((8, side, side, 3), np.uint8)
    media.write_video(tmp_path / "big.mp4", np.concatenate([video] * (frames // 8)), fps=24)
    with media.VideoReader(tmp_path / "big.mp4") as reader:
        tracemalloc.start()
        small = reader.read_resized(0, frames, side=16)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert small.shape == (frames, 16, 16, 3)
    assert peak < side * side * 3 * frames / 2
