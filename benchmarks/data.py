"""The input pipeline against raw decoding, against a training step, and what packing wastes.

    python -m benchmarks.data [--media FOLDER] [--json FILE] [--quick]

Ratios compare single threads of one process in one run, by turns. See RESULTS.md.
"""

import argparse
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import jax
import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from benchmarks.machine import describe_machine
from benchmarks.table import table
from elastictok_jax.config import apply_overrides, default_source_config, resolve_config
from elastictok_jax.data import media
from elastictok_jax.data.media import color
from elastictok_jax.data.mixture import Mixture
from elastictok_jax.data.pipeline import read_ahead
from elastictok_jax.data.prepare.supervisor import prepare_data_set
from elastictok_jax.data.prepare.transcode import TranscodeSettings
from elastictok_jax.data.sources.base import name_hash
from elastictok_jax.data.sources.file_source import EMBEDDED
from elastictok_jax.data.sources.splits import SourceSplit, open_splits
from elastictok_jax.experiment_registry import get_experiment
from elastictok_jax.models.registry import family_of_config
from elastictok_jax.training.state import init_state
from elastictok_jax.training.step import make_train_step


def config_for(path, *, side: int, blocks: int, **options: Any):
    """The quick start's config on another source, nothing kept in memory."""
    config = get_experiment("quickstart")
    values = {
        "data.sources.main.path": str(path),
        "data.eval_fraction": 0.0,
        "data.cache_mib": 0,
        "data.sequence_blocks": blocks,
        "data.batch_size": 1,
        "data.decode_threads": 1,
        "video.resolution": side,
        "masking.min_tokens": 1,
    }
    apply_overrides(
        config, values | {key.replace("__", "."): value for key, value in options.items()}
    )
    return resolve_config(config)


def seconds(function: Callable[[], Any]) -> tuple[Any, float]:
    """What `function` returns, and how long it takes."""
    start = time.perf_counter()
    count = function()
    return count, time.perf_counter() - start


def compare_with_raw(
    folder: Path, *, kind: str, side: int, blocks: int, repeats: int
) -> dict[str, Any]:
    """Epochs of the videos or images of a prepared data set against plain decoding of the same
    stored files as often, on one core; median of the ratios of `repeats` turns. A block of images
    is one frame here, so that both make as many."""
    options: dict[str, Any] = {"data__sources__main__kind": kind}
    if kind == "image":
        options |= {"video__frames_per_block": 1, "model__patch": (1, 8, 8)}
    config = config_for(folder, side=side, blocks=blocks, **options)
    reader = family_of_config(config).task.reader(open_splits(config), split="train")
    (stream,) = reader.mixture.streams
    # Whole epochs of small data sets, so that plans of rows are a fair part of it.
    epochs = max(1, 4 * config.data.packing_rows * blocks // stream.blocks) if repeats > 1 else 1
    rows = max(1, epochs * stream.blocks // blocks)
    records = tfds.builder_from_directory(folder).as_data_source("train")
    files = [record["data"] for record in records if record["kind"] == kind.encode()]

    def ours(turn: int) -> int:
        for row in range(turn * rows, (turn + 1) * rows):
            reader(row)
        return rows * blocks * config.video.frames_per_block

    def raw(**flags: Any) -> int:
        count = 0
        for data in files * epochs:
            if kind == "image":
                np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
                count += 1
                continue
            with av.open(io.BytesIO(data), "r") as container:
                container.streams.video[0].thread_type = "NONE"
                for frame in container.decode(video=0):
                    frame.to_ndarray(format="rgb24", **flags)
                    count += 1
        return count

    ours(repeats)  # an epoch beyond those measured, to warm up
    raw_rates: list[float] = []
    our_rates: list[float] = []
    default_rates: list[float] = []
    for turn in range(repeats):
        for rates, run in (
            (raw_rates, lambda: raw(interpolation=color.EXACT_COLORS)),
            (our_rates, lambda turn=turn: ours(turn)),  # type: ignore[misc]
            (default_rates, raw),
        ):
            count, spent = seconds(run)
            rates.append(count / spent)
    ratios = [raw_rate / rate for raw_rate, rate in zip(raw_rates, our_rates, strict=True)]
    return {
        "kind": kind,
        "resolution": side,
        "sequence_blocks": blocks,
        "raw_frames_per_second": statistics.median(raw_rates),
        "raw_default_colors_frames_per_second": statistics.median(default_rates),
        "pipeline_frames_per_second": statistics.median(our_rates),
        "overhead": statistics.median(ratios) - 1,
    }


def throughput(path, *, side: int, workers: int, threads: int, batches: int) -> dict[str, Any]:
    """Frames and tokens a second through `read_ahead`, once warm."""
    options = dict(data__workers=workers, data__decode_threads=threads, data__batch_size=4)
    config = config_for(path, side=side, blocks=4, **options)
    reader = family_of_config(config).task.reader(open_splits(config), split="train")
    read = read_ahead(reader, start=0, stop=3 * batches)  # not to its end: processes stop there

    def run() -> None:
        for _ in range(batches):
            next(read)

    run()
    _, spent = seconds(run)
    row_blocks = batches * config.data.batch_size * config.data.sequence_blocks
    return {
        "workers": workers,
        "threads": threads,
        "resolution": side,
        "frames_per_second": row_blocks * config.video.frames_per_block / spent,
        "tokens_per_second": row_blocks * reader.geometry.tokens / spent,
    }


def step_consumption(*, steps: int) -> dict[str, float]:
    """Tokens and frames a second that the quick start's training step takes, fed one batch."""
    config = resolve_config(get_experiment("quickstart"))
    task = family_of_config(config).task
    reader = task.reader(open_splits(config), split="train")
    batch = {key: jnp.asarray(value) for key, value in reader(0).items() if key != "faults"}
    step = jax.jit(make_train_step(task, config), donate_argnums=0)
    state = jax.jit(lambda: init_state(task, config))()
    state, metrics = step(state, batch, {})
    jax.block_until_ready(metrics)

    def run() -> int:
        nonlocal state, metrics
        for _ in range(steps):
            state, metrics = step(state, batch, {})
        jax.block_until_ready(metrics)
        return steps * config.data.batch_size * config.data.sequence_blocks

    blocks, spent = seconds(run)
    return {
        "tokens_per_second": blocks * reader.geometry.tokens / spent,
        "frames_per_second": blocks * config.video.frames_per_block / spent,
    }


class Durations:
    """A source of given lengths, planned and never read."""

    fingerprint = "durations"

    def __init__(self, frames: np.ndarray):
        self.frames, self.is_video = frames, frames > 1
        self.fps = np.where(self.is_video, 24.0, 0.0)
        self.place = np.arange(len(frames), dtype=np.uint64)


def packing_waste(*, blocks: int, rows: int) -> dict[str, Any]:
    """Padding, cuts and planning time on web-like durations: log-normal with a median of 10 s
    and a deviation of 1.0 at 24 frames a second (a tenth over 36 s), and a fifth images."""
    rng = np.random.default_rng(0)
    frames = np.maximum(8, np.exp(rng.normal(np.log(240), 1.0, 20_000))).astype(np.int64)
    sources = {"images": np.ones(20_000, np.int64), "videos": frames}
    config = config_for("synthetic", side=64, blocks=blocks)
    feeds = tuple(
        SourceSplit(
            name,
            name_hash(name),
            Durations(lengths),  # type: ignore[arg-type]
            default_source_config(path=name, weight=weight),
            np.arange(len(lengths)),
        )
        for (name, lengths), weight in zip(sources.items(), (0.2, 0.8), strict=True)
    )
    mixture = Mixture(feeds, config, split="train")
    planned, spent = [], 0.0
    for row in range(rows):
        clips, took = seconds(lambda row=row: mixture.row(row))  # type: ignore[misc]
        planned.append(clips)
        spent += took
    used = sum(clip.blocks for row in planned for clip in row)
    videos = [clip for row in planned for clip in row if clip.feed == 1]
    short_pieces = sum(clip.blocks < blocks for clip in videos)
    fresh = Mixture(feeds, config, split="train")
    _, near = seconds(lambda: len(fresh.row(0)))
    _, far = seconds(lambda: len(fresh.row(10**9)))
    per_block = config.video.frames_per_block
    return {
        "sequence_blocks": blocks,
        "padding_fraction": 1 - used / (rows * blocks),
        "tail_frames_fraction": float((frames % per_block).sum() / frames.sum()),
        "clips_a_row": sum(map(len, planned)) / rows,
        "video_pieces_shorter_than_a_row": short_pieces / max(1, len(videos)),
        "plan_ms_a_row": 1e3 * spent / rows,
        "first_row_ms": 1e3 * near,
        "row_1e9_ms": 1e3 * far,
    }


def measure(*, originals: Path, quick: bool) -> dict[str, Any]:
    """All of it, as JSON values."""
    cores = os.sched_getaffinity(0)
    results: dict[str, Any] = {
        "machine": describe_machine(),
        "media": "embedded" if originals == EMBEDDED else originals.name,
    }
    sides = (32,) if quick else (64, 256)
    with tempfile.TemporaryDirectory() as temporary:
        folders = {}
        for side in sides:
            folders[side] = Path(temporary) / str(side)
            options = TranscodeSettings(side, crf=18, scene_cuts=False, limits=media.LIMITS)
            prepare_data_set(
                [str(originals)], output=folders[side], settings=options, jobs=len(cores)
            )
        os.sched_setaffinity(0, {min(cores)})
        try:
            results["against_raw"] = [
                compare_with_raw(
                    folders[side], kind=kind, side=side, blocks=n, repeats=1 if quick else 3
                )
                for kind in ("video", "image")
                for side in sides
                for n in ((4,) if quick else (4, 16))
            ]
        finally:
            os.sched_setaffinity(0, cores)
        raw_folder = originals / "train" if originals == EMBEDDED else originals
        kinds = {"prepared": None, "folder": raw_folder, "synthetic": "synthetic"}
        settings = ((0, 1), (1, 1)) if quick else ((0, 1), (0, 2), (1, 1), (2, 1), (4, 1))
        results["throughput"] = [
            {"source": source}
            | throughput(
                folders[side] if path is None else path,
                side=side,
                workers=workers,
                threads=threads,
                batches=2 if quick else 4 if source == "folder" else 16,  # originals are large
            )
            for source, path in kinds.items()
            for side in (sides if source == "prepared" else sides[:1])
            for workers, threads in settings
        ]
    results["training_step"] = step_consumption(steps=1 if quick else 20)
    results["packing"] = [
        packing_waste(blocks=n, rows=64 if quick else 1024) for n in (4, 16, 64, 256)
    ]
    return results


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--media", type=Path, default=EMBEDDED, help="a folder of originals")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--quick", action="store_true", help="see that it runs; no figures")
    args = parser.parse_args(argv)
    results = measure(originals=args.media, quick=args.quick)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    print(f"machine: {results['machine']}; media: {results['media']}")
    for name in ("against_raw", "throughput", "packing"):
        print(f"\n{name}\n\n{table(results[name])}")
    print(f"\ntraining_step\n\n{table([results['training_step']])}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
