"""Draws a picture of one batch, with its clips and the tokens that each block keeps.

Positions are in pixels of the picture. Dimension key: n blocks shown, N blocks of a row,
L tokens a block, F frames of a block that are shown, H height, W width.
"""

import concurrent.futures
import dataclasses
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from matplotlib.patches import Rectangle
from PIL import Image
from tqdm import tqdm

from elastictok_jax.config import resolve_config
from elastictok_jax.data.packing import PackedClip
from elastictok_jax.data.pipeline import BatchReader
from elastictok_jax.data.sources.splits import open_splits
from elastictok_jax.errors import UsageError
from elastictok_jax.evaluation.report.figures import (
    figure_label,
    plt,
    save_figure,
    shorten_figure_label,
)
from elastictok_jax.evaluation.report.side_by_side import COLOURS
from elastictok_jax.models.base import StepKeys, Task
from elastictok_jax.models.registry import family_of_config
from elastictok_jax.storage.outputs import require_output_file

MOST_ROWS = 64
MOST_THUMBS = 20  # of a row
THUMB = 96  # pixels
MARGIN, HEAD, LABEL, BAR, NUMBER, GAP = 110, 52, 30, 36, 14, 22  # pixels
LEAST_WIDTH = 900
DPI = 100
LETTER = 5.6  # pixels, of a label
REPLACED = "#c00000"


def inspect_data(
    config: ml_collections.ConfigDict, *, output: Path, split: str = "train", batch: int = 0
) -> dict[str, Any]:
    """Draws batch `batch` of a new run, counted from 0, as a PNG, and returns a summary of it.

    Raises:
      UsageError: bad config, data, batch or output.
    """
    if batch < 0:
        raise UsageError(f"--batch {batch}: batches count from 0")
    if output.suffix.lower() != ".png" or not output.parent.is_dir():
        raise UsageError(f"-o {output}: give a .png in a folder that exists")
    require_output_file(output, change="choose another -o")
    config = resolve_config(config)
    task = family_of_config(config).task
    reader = task.reader(open_splits(config), split=split)
    blocks = evenly_spaced_thumbnails(config.data.sequence_blocks, most=MOST_THUMBS)
    frames = evenly_spaced_thumbnails(
        config.video.frames_per_block, most=MOST_THUMBS // len(blocks)
    )
    lengths_BN = inspected_batch_lengths(config, task, batch) if split == "train" else None
    rows = _read_rows(
        reader,
        batch,
        blocks=blocks,
        lengths_BN=lengths_BN,
        shrink=lambda frames_nFHWC: _thumbnails(frames_nFHWC[:, frames]),
    )
    per_block = reader.geometry.tokens
    title = _title(config, split, batch, kept=lengths_BN is not None, tokens_per_block=per_block)
    sizes = dict(blocks=blocks, tokens_per_block=per_block)
    _draw_batch(output, rows, config=config, title=title, **sizes)
    return _summarise_batch(config, rows, split=split, batch=batch, tokens_per_block=per_block)


@dataclasses.dataclass(frozen=True)
class BatchRow:
    """A row of a global batch.

    Attributes:
      number: the global row.
      clips: left to right, each with the name of its source and item.
      segments_N: int32, 0 = padding; clips count from 1, a replaced block is a separate segment.
      clip_N: int64, index in `clips` of each block's clip, -1 for padding.
      lengths_N: int32, tokens that each block keeps; None if no training step sees the row.
      replaced: the error of each block that could not be read.
      frames_nFHWC: uint8, frames of the requested blocks.
    """

    number: int
    clips: list[tuple[PackedClip, str, str]]
    segments_N: np.ndarray
    clip_N: np.ndarray
    lengths_N: np.ndarray | None
    replaced: dict[int, str]
    frames_nFHWC: np.ndarray

    def summary(self) -> dict[str, Any]:
        """The row without its pixels, for JSON."""
        lengths = {} if self.lengths_N is None else {"lengths": self.lengths_N.tolist()}
        return {
            "row": self.number,
            "clips": [
                {"source": source, "item": item, "epoch": clip.epoch}
                | {"start": clip.start, "blocks": clip.blocks}
                for clip, source, item in self.clips
            ],
            "segments": self.segments_N.tolist(),
            **lengths,
            "replaced": {str(block): fault for block, fault in self.replaced.items()},
        }


def _read_rows(
    reader: BatchReader,
    batch: int,
    *,
    blocks: np.ndarray,
    lengths_BN: np.ndarray | None,
    shrink: Callable[[np.ndarray], np.ndarray],
) -> list[BatchRow]:
    """Returns all rows of a batch, with the frames of `blocks` of each, reduced by `shrink`.

    Each thread holds one row at full size, since a batch of long rows may not fit in memory.
    """
    config = reader.config
    first = reader.first_row + batch * config.data.batch_size

    def read(place: int) -> BatchRow:
        lengths_N = None if lengths_BN is None else lengths_BN[place]
        row = read_row_to_inspect(reader, first + place, blocks=blocks, lengths_N=lengths_N)
        return dataclasses.replace(row, frames_nFHWC=shrink(row.frames_nFHWC))

    with concurrent.futures.ThreadPoolExecutor(config.data.decode_threads) as pool:
        reading = pool.map(read, range(config.data.batch_size))
        shown = tqdm(reading, total=config.data.batch_size, unit="row", disable=None)
        return list(shown)


def read_row_to_inspect(
    reader: BatchReader, number: int, *, blocks: np.ndarray, lengths_N: np.ndarray | None
) -> BatchRow:
    """Returns global row `number`, with the frames of `blocks`."""
    per_block = reader.geometry.inputs
    parts = reader.read_row(number)
    clips = reader.mixture.row(number)
    segments_N = parts["segment_ids"][::per_block]
    clip_N = np.repeat(np.arange(len(clips)), [clip.blocks for clip in clips])
    blocks_NPD = parts["patches"].reshape(len(segments_N), per_block, -1)
    named = [
        (clip, feed.name, feed.source.name(clip.item))
        for clip in clips
        for feed in (reader.feeds[clip.feed],)
    ]
    return BatchRow(
        number=number,
        clips=named,
        segments_N=segments_N,
        clip_N=np.where(segments_N == 0, -1, clip_N),
        lengths_N=lengths_N,
        replaced=parts["faults"],
        frames_nFHWC=reader.codec.unpack(blocks_NPD[blocks]),
    )


def inspected_batch_lengths(
    config: ml_collections.ConfigDict, task: Task, step: int
) -> np.ndarray | None:
    """Returns int32 [B, N], the tokens that each block keeps at training step `step`.

    None for a task that does not drop tokens.
    """

    def draw(step: jax.Array) -> jax.Array | None:
        return task.keep_lengths(jnp.arange(config.data.batch_size), StepKeys(config.seed, step))

    lengths_BN = jax.jit(draw)(jnp.int32(step))
    return None if lengths_BN is None else np.asarray(lengths_BN)


def _summarise_batch(
    config: ml_collections.ConfigDict,
    rows: list[BatchRow],
    *,
    split: str,
    batch: int,
    tokens_per_block: int,
) -> dict[str, Any]:
    """Returns what `elastictok inspect-data --json` prints."""
    valid_BN = np.stack([row.segments_N for row in rows]) != 0
    kept: dict[str, float] = {}
    if rows[0].lengths_N is not None and valid_BN.any():
        lengths_BN = np.stack([row.lengths_N for row in rows if row.lengths_N is not None])
        kept = {"kept_fraction": float(lengths_BN[valid_BN].mean() / tokens_per_block)}
    return {
        "experiment": config.name,
        "split": split,
        "batch": batch,
        "tokens_per_block": tokens_per_block,
        "padding_fraction": float(1 - valid_BN.mean()),
        **kept,
        "replaced_blocks": sum(len(row.replaced) for row in rows),
        "rows": [row.summary() for row in rows],
    }


def evenly_spaced_thumbnails(count: int, *, most: int) -> np.ndarray:
    """Returns int64, up to `most` of 0, ..., count - 1, evenly spaced from 0."""
    shown = min(count, max(1, most))
    return np.arange(shown) * count // shown


def _thumbnails(frames_nFHWC: np.ndarray) -> np.ndarray:
    """Returns thumbnails uint8 [n, F, THUMB, THUMB, 3]."""
    n, shown, *_ = frames_nFHWC.shape
    small = np.empty((n, shown, THUMB, THUMB, 3), np.uint8)
    for block, frame in np.ndindex(n, shown):
        image = Image.fromarray(np.ascontiguousarray(frames_nFHWC[block, frame]))
        small[block, frame] = np.asarray(image.resize((THUMB, THUMB), Image.Resampling.LANCZOS))
    return small


def _title(
    config: ml_collections.ConfigDict,
    split: str,
    batch: int,
    *,
    kept: bool,
    tokens_per_block: int,
) -> str:
    data, video, side = config.data, config.video, config.video.resolution
    use = f", training step {batch + 1} of a new run" if split == "train" else ""
    bars = "no bars: lengths are drawn in training only"
    if kept:
        masking = config.masking
        limits = f"{masking.kind}, {masking.min_tokens} to {tokens_per_block}"
        bars = f"bars: tokens kept at that step ({limits})"
    return (
        f"{figure_label(config.name)}: {split} batch {batch}{use}\n{data.batch_size} rows of "
        f"{data.sequence_blocks} blocks; a block: {video.frames_per_block} frames of {side} x "
        f"{side}, {tokens_per_block} tokens; {bars}"
    )


def _draw_batch(
    path: Path,
    rows: list[BatchRow],
    *,
    config: ml_collections.ConfigDict,
    title: str,
    blocks: np.ndarray,
    tokens_per_block: int,
) -> None:
    """Writes a PNG of `rows`, one below the other, with frames of `blocks`."""
    per_row, frames = config.data.sequence_blocks, rows[0].frames_nFHWC.shape[1]
    notes = [
        f"{shown} of {total} {what} shown"
        for what, shown, total in (
            ("rows", min(len(rows), MOST_ROWS), len(rows)),
            ("blocks of each row", len(blocks), per_row),
            ("frames of each block", frames, config.video.frames_per_block),
        )
        if shown < total
    ]
    rows = rows[:MOST_ROWS]
    bar = BAR + NUMBER if rows[0].lengths_N is not None else 0
    row_height = LABEL + THUMB + bar + GAP
    width = max(LEAST_WIDTH, MARGIN + len(blocks) * frames * THUMB + 10)
    height = HEAD + len(rows) * row_height + (16 if notes else 0)
    figure = plt.figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    axes.text(8, 8, title, fontsize=9, va="top", linespacing=1.4)
    axes.text(8, height - 6, "; ".join(notes), fontsize=8, va="bottom", color="#555555")
    for place, row in enumerate(rows):
        top = HEAD + place * row_height
        _draw_row(axes, row, top=top, blocks=blocks)
        if row.lengths_N is not None:
            top += LABEL + THUMB + 4
            _draw_lengths(axes, row, top=top, blocks=blocks, most=tokens_per_block)
    save_figure(figure, path, dpi=DPI)
    plt.close(figure)


def _colour(row: BatchRow, block: int) -> str:
    if block in row.replaced:
        return REPLACED
    return "#888888" if row.clip_N[block] < 0 else COLOURS[row.clip_N[block] % len(COLOURS)]


def _draw_row(axes, row: BatchRow, *, top: int, blocks: np.ndarray) -> None:
    """Draws labels and thumbnails, with a frame around each run of blocks of one segment."""
    count, padding = len(row.segments_N), int((row.segments_N == 0).sum())
    about = f"row {row.number}\n{len(row.clips)} clips"
    about += f"\n{padding} padding" if padding else ""
    about += f"\n{len(row.replaced)} replaced" if row.replaced else ""
    axes.text(8, top + LABEL, about, fontsize=8, va="top", linespacing=1.4)
    cell = row.frames_nFHWC.shape[1] * THUMB
    cells = range(len(blocks))
    for segment, group in groupby(cells, key=lambda place: row.segments_N[blocks[place]]):
        run = list(group)
        left, wide = MARGIN + run[0] * cell, len(run) * cell
        first = int(blocks[run[0]])
        colour = _colour(row, first)
        letters = int(wide / LETTER)
        for line, text in enumerate(_label(row, first)):
            y = top + 2 + line * 13
            shown = shorten_figure_label(figure_label(text), letters)
            weight = "bold" if line == 0 else "normal"
            style = dict(fontsize=7.5, va="top", color=colour, weight=weight)
            axes.text(left + 3, y, shown, **style)
        box = dict(xy=(left + 2, top + LABEL), width=wide - 4, height=THUMB, linewidth=3)
        if segment == 0:
            axes.add_patch(Rectangle(**box, facecolor="white", edgecolor="#888888", hatch="///"))
            continue
        for place in run:
            for index, frame in enumerate(row.frames_nFHWC[place]):
                x = MARGIN + place * cell + index * THUMB
                extent = (x + 2, x + THUMB - 2, top + LABEL + THUMB, top + LABEL)
                axes.imshow(frame, extent=extent, aspect="auto", interpolation="antialiased")
        if first in row.replaced:
            hatched = Rectangle(**(box | {"linewidth": 0}), fill=False, hatch="xx", alpha=0.5)
            axes.add_patch(hatched)
        axes.add_patch(Rectangle(**box, fill=False, edgecolor=colour))
        if len(blocks) < count:
            for place in run:
                axes.text(
                    MARGIN + place * cell + 6, top + LABEL + 5, f"block {blocks[place]}",
                    fontsize=6.5, va="top", color="white",
                    bbox=dict(facecolor="black", alpha=0.6, pad=1, linewidth=0),
                )  # fmt: skip


def _label(row: BatchRow, block: int) -> tuple[str, str]:
    """Returns the source, blocks and item of the clip in a block, as text."""
    if row.segments_N[block] == 0:
        return "padding", ""
    clip, source, item = row.clips[row.clip_N[block]]
    if block in row.replaced:
        return f"{source}, replaced", item
    last = clip.start + clip.blocks - 1
    span = f"block {clip.start}" if clip.blocks == 1 else f"blocks {clip.start}-{last}"
    return f"{source}, {span}", item


def _draw_lengths(axes, row: BatchRow, *, top: int, blocks: np.ndarray, most: int) -> None:
    """Draws a bar for every block of the row, with or without thumbnail."""
    assert row.lengths_N is not None
    count = len(row.lengths_N)
    wide = len(blocks) * row.frames_nFHWC.shape[1] * THUMB / count
    inset = 2 if wide > 12 else 0
    clip_starts = np.flatnonzero(np.diff(row.segments_N, prepend=-1))
    for block, length in enumerate(row.lengths_N):
        left, tall = MARGIN + block * wide, BAR * length / most
        box = (left + inset, top), wide - 2 * inset, BAR
        if row.segments_N[block] == 0:
            axes.add_patch(Rectangle(*box, facecolor="white", edgecolor="#888888", hatch="///"))
            continue
        axes.add_patch(Rectangle(*box, facecolor="#e8e8e8"))
        axes.add_patch(
            Rectangle((left + inset, top + BAR - tall), box[1], tall, facecolor=_colour(row, block))
        )
    for place, block in enumerate(blocks):
        if row.segments_N[block]:
            axes.text(
                MARGIN + (place + 0.5) * wide * count / len(blocks), top + BAR + 1,
                f"{row.lengths_N[block]}", fontsize=7, ha="center", va="top",
            )  # fmt: skip
    edges = MARGIN + clip_starts[1:] * wide
    axes.vlines(edges, top - 2, top + BAR + 2, color="black", linewidth=1.2)
