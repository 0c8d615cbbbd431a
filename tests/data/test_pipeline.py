"""Batch k is a function of (seed, k), whoever reads it, from wherever, with whatever workers."""

import dataclasses
import os
import signal
import threading
import time
import tracemalloc

import jax
import numpy as np
import psutil
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from elastictok_jax.config import apply_overrides, resolve_config
from elastictok_jax.data import clip_reader, media
from elastictok_jax.data.batch_sharding import BatchPart, batch_to_device, local_batch_part
from elastictok_jax.data.pipeline import DeviceBatches, read_ahead
from elastictok_jax.data.sources.splits import SourceSplits, open_splits
from elastictok_jax.data.sources.synthetic import SyntheticSource
from elastictok_jax.errors import RunError, UsageError
from elastictok_jax.experiment_registry import get_experiment
from tests.tiny import codec_of, reader_of, sequence_tokens

BATCHES, ROWS = 6, 4


def tiny(**overrides):
    config = get_experiment("quickstart")
    base = {
        "video.resolution": 16,
        "masking.min_tokens": 1,
        "data.batch_size": ROWS,
        "data.sequence_blocks": 3,
        "data.packing_rows": 8,
    }
    apply_overrides(
        config, base | {key.replace("__", "."): value for key, value in overrides.items()}
    )
    return resolve_config(config)


def open_reader(config, *, split="train", **part):
    return reader_of(config, open_splits(config), split=split, **part)


def stack(batches) -> list[tuple[bytes, bytes]]:
    return [(batch["patches"].tobytes(), batch["segment_ids"].tobytes()) for batch in batches]


@pytest.fixture(scope="module")
def from_the_start():
    reader = open_reader(tiny())
    return list(read_ahead(reader, start=0, stop=BATCHES))


def test_shapes_and_types(from_the_start):
    config = tiny()
    assert len(from_the_start) == BATCHES
    for batch in from_the_start:
        assert batch.keys() == {"patches", "segment_ids", "faults"} and not batch["faults"]
        assert batch["patches"].shape == (ROWS, sequence_tokens(config), 2 * 8 * 8 * 3)
        assert batch["patches"].dtype == np.uint8
        assert batch["segment_ids"].shape == (ROWS, sequence_tokens(config))
        assert batch["segment_ids"].dtype == np.int32
        assert batch["segment_ids"].min() >= 1
    rows = {row.tobytes() for batch in from_the_start for row in batch["patches"]}
    assert len(rows) == BATCHES * ROWS  # no row comes twice


@pytest.mark.parametrize(
    ("workers", "threads", "start"), [(0, 1, 0), (0, 4, 3), (1, 2, 0), (4, 1, 2)]
)
def test_neither_start_nor_threads_nor_workers_matter(from_the_start, workers, threads, start):
    options = dict(data__workers=workers, data__decode_threads=threads, data__prefetch=threads)
    reader = open_reader(tiny(**options))
    batches = list(read_ahead(reader, start=start, stop=BATCHES))
    assert stack(batches) == stack(from_the_start[start:])
    # In whatever order, too.
    assert stack([reader(4), reader(1), reader(4)]) == stack(from_the_start[k] for k in (4, 1, 4))


@pytest.mark.parametrize("by", ["rows", "blocks"])
def test_parts_of_several_processes_make_the_whole_batch(from_the_start, by):
    needed = [np.zeros((ROWS, 3), bool) for _ in range(2)]
    if by == "rows":
        needed[0][:1], needed[1][1:] = True, True
    else:
        needed[0][:, :2], needed[1][:, 2:] = True, True
    readers = [open_reader(tiny(), part=BatchPart(needed_BN, needed_BN)) for needed_BN in needed]
    parts = [list(read_ahead(reader, start=0, stop=2)) for reader in readers]
    for index in range(2):
        for key in ("patches", "segment_ids"):
            joined = np.concatenate([part[index][key] for part in parts], axis=int(by == "blocks"))
            np.testing.assert_array_equal(joined, from_the_start[index][key])


def test_batch_size_moves_no_row(from_the_start):
    """Row r of the run is the same in batches of 4 and of 2."""
    reader = open_reader(tiny(data__batch_size=2))
    for index in range(4):
        whole = from_the_start[index // 2]["patches"]
        half = whole[2 * (index % 2) : 2 * (index % 2) + 2]
        np.testing.assert_array_equal(reader(index)["patches"], half)


def test_another_seed_and_the_other_split_give_other_data(from_the_start):
    first = from_the_start[0]["patches"]
    for config, split in ((tiny(seed=1), "train"), (tiny(), "heldout")):
        other = open_reader(config, split=split)(0)["patches"]
        assert not any((row == mate).all() for row, mate in zip(first, other, strict=True))


def test_heldout_rows_are_not_flipped_or_cropped_at_random(tmp_path):
    """One wide picture for both splits: held-out rows are its middle, training rows are not."""
    picture = np.random.default_rng(0).integers(0, 256, (16, 48, 3), dtype=np.uint8)
    for name in range(6):  # the same content under names that fall on both sides
        media.write_image(tmp_path / f"{name}.png", picture)
    config = tiny(data__sources__main__path=str(tmp_path), data__eval_fraction=0.5)
    middle = picture[:, 16:32]
    rows = {}
    for split in ("train", "heldout"):
        batch = open_reader(config, split=split)(0)
        first = batch["patches"][:, :4].reshape(ROWS, 2, 2, 2, 8, 8, 3)[:, :, :, 0]
        rows[split] = first.transpose(0, 1, 3, 2, 4, 5).reshape(ROWS, 16, 16, 3)
    for row in rows["heldout"]:
        np.testing.assert_array_equal(row, middle)
    assert len({row.tobytes() for row in rows["train"]}) > 1
    assert not all((row == middle).all() for row in rows["train"])


def test_no_heldout_file_is_said(tmp_path):
    media.write_image(tmp_path / "only.png", np.zeros((16, 16, 3), np.uint8))
    config = tiny(data__sources__main__path=str(tmp_path))
    with pytest.raises(UsageError, match=r"have no heldout items: .*data\.eval_fraction = 0\.1"):
        open_reader(config, split="heldout")


@pytest.fixture
def noisy_folder(tmp_path):
    for name in range(10):
        frames = np.random.default_rng(name).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
        media.write_video(tmp_path / f"{name}.mp4", frames, fps=10)
    return tmp_path


def one_device():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    return NamedSharding(mesh, PartitionSpec("data"))


def folder_config(folder, **options):
    return tiny(data__sources__main__path=str(folder), data__eval_fraction=0.0, **options)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_damaged_after_the_start_is_replaced_named_once_and_counted(noisy_folder, workers):
    config = folder_config(noisy_folder, data__cache_mib=0, data__workers=workers)
    config.data.max_bad_fraction = 0.5
    reader = open_reader(config)
    path = noisy_folder / "3.mp4"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    batches = DeviceBatches(reader, one_device(), start=0, stop=20)
    read = [next(batches) for _ in range(20)]
    batches.close()
    (fault,) = batches.new_faults
    assert "3.mp4" in fault and "truncated" in fault
    segments = np.concatenate([np.asarray(batch["segment_ids"]) for batch in read])
    assert segments.min() >= 1
    read = [clip for row in range(80) for clip in reader.mixture.row(row)]
    assert batches.replaced == sum(clip.blocks for clip in read if clip.item == 3) > 0


def test_damage_after_a_resume_is_judged_with_all_that_was_read_before(noisy_folder):
    """12 blocks a batch, all of them unreadable."""
    for first_row, replaced_before, stops in ((0, 0, 1), (400, 0, 12), (400, 110, 1)):
        config = folder_config(noisy_folder, data__cache_mib=0)
        reader = open_reader(config, first_row=first_row)
        reader.clips.read = lambda clip, blocks: (
            clip_reader.ClipBlock(np.zeros((4, 16, 16, 3), np.uint8), "damaged") for _ in blocks
        )
        batches = DeviceBatches(
            reader, one_device(), start=0, stop=20, replaced_before=replaced_before
        )
        with pytest.raises(RunError, match=f"^{replaced_before + 12 * stops} of .* blocks"):
            for _ in range(20):
                next(batches)
        batches.close()
        assert batches.replaced == 12 * stops  # this process's own, since the start


def test_too_much_damage_stops_with_a_message(noisy_folder):
    reader = open_reader(folder_config(noisy_folder, data__cache_mib=0))
    for name in range(4):
        (noisy_folder / f"{name}.mp4").write_bytes(b"")
    batches = DeviceBatches(reader, one_device(), start=0, stop=100)
    with pytest.raises(RunError, match=r"blocks could not be read, more than data\.max_bad_fract"):
        for _ in range(100):
            next(batches)
    batches.close()


def test_a_worker_that_dies_is_noticed_within_seconds():
    config = tiny(data__workers=2, data__prefetch=1, data__cache_mib=0)
    batches = DeviceBatches(open_reader(config), one_device(), start=0, stop=10**6)
    for _ in range(3):
        next(batches)
    workers = [p for p in psutil.Process().children() if "spawn_main" in " ".join(p.cmdline())]
    assert len(workers) == 2
    os.kill(workers[0].pid, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(RunError, match=r"reading the data failed: .*terminated unexpectedly"):
        for _ in range(100):
            next(batches)
    assert time.monotonic() - began < 20
    batches.close()


def test_storage_that_hangs_is_noticed():
    release = threading.Event()

    class Hanging(SyntheticSource):
        def read(self, item, indices, *, side):
            release.wait()
            return super().read(item, indices, side=side)

    config = tiny(data__sources__main__path="synthetic", data__timeout_seconds=1)
    (feed,) = open_splits(config).train
    feeds = SourceSplits((dataclasses.replace(feed, source=Hanging()),), (), ())
    batches = DeviceBatches(reader_of(config, feeds, split="train"), one_device(), start=0, stop=10)
    with pytest.raises(RunError, match=r"no batch was read in data\.timeout_seconds = 1: "):
        next(batches)
    release.set()
    batches.close()


@pytest.mark.parametrize("axes", [("data", "sequence"), ("sequence", "data")])
def test_to_device_places_the_part_of_this_process(from_the_start, axes):
    mesh = jax.make_mesh((1, 1), axes, axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:1])
    sharding, config = NamedSharding(mesh, PartitionSpec("data", "sequence")), tiny()
    part = local_batch_part(sharding, config, codec_of(config).geometry)
    assert part.needed_BN.all() and part.counted_BN.all() and part.stretch == 3
    block_inputs = codec_of(config).geometry.inputs
    placed = batch_to_device(
        from_the_start[0], part=part, sharding=sharding, block_inputs=block_inputs
    )
    for key in ("patches", "segment_ids"):
        assert placed[key].sharding == sharding
        np.testing.assert_array_equal(placed[key], from_the_start[0][key])


def test_what_is_kept_in_memory_changes_nothing(from_the_start):
    for cache_mib in (0, 1):  # nothing fits; some files do
        reader = open_reader(tiny(data__cache_mib=cache_mib))
        assert stack([reader(k) for k in range(2)]) == stack(from_the_start[:2])


def test_first_row_moves_the_whole_sequence_of_batches(from_the_start):
    reader = open_reader(tiny(), first_row=2 * ROWS)
    assert stack([reader(0), reader(1)]) == stack(from_the_start[2:4])


def test_a_large_video_is_resized_in_pieces(tmp_path):
    """Decoding to keep in memory never holds a whole clip at its full size."""
    side, frames = 720, 160
    video = np.zeros((8, side, side, 3), np.uint8)
    media.write_video(tmp_path / "big.mp4", np.concatenate([video] * (frames // 8)), fps=24)
    with media.VideoReader(tmp_path / "big.mp4") as reader:
        tracemalloc.start()
        small = reader.read(0, frames, side=16)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert small.shape == (frames, 16, 16, 3)
    assert peak < side * side * 3 * frames / 2
