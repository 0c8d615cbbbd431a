"""What one global batch of an experiment holds, as the training step will meet it.

Dimension key: B batch, N blocks, L tokens a block, F frames a block, H height, W width.
"""

import concurrent.futures
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from tqdm import tqdm

from elastictok_jax.config import block_tokens
from elastictok_jax.data.packing import Clip
from elastictok_jax.data.pipeline import BatchReader
from elastictok_jax.models.patching import unpatchify
from elastictok_jax.training.step import keep_lengths, step_keys


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a global batch.

    Attributes:
      number: the global row; clips: left to right, each with the name of its source and item.
      segments_N: int32, 0 = padding; clips count from 1, a replaced block is a segment of its own.
      clip_N: int64, the place in `clips` of what stands in each block, -1 for padding.
      lengths_N: int32, tokens that each block keeps; None where no training step sees the row.
      replaced: for each block that could not be read, why.
      frames_nFHWC: uint8, the blocks asked for.
    """

    number: int
    clips: list[tuple[Clip, str, str]]
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


def read_rows(
    reader: BatchReader,
    batch: int,
    *,
    blocks: np.ndarray,
    lengths_BN: np.ndarray | None,
    shrink: Callable[[np.ndarray], np.ndarray],
) -> list[Row]:
    """All rows of a batch, with the frames of `blocks` of each, made smaller by `shrink`.

    One row a thread is held at full size, since a batch of long rows may not fit in memory.
    """
    config = reader.config
    first = reader.first_row + batch * config.data.batch_size

    def read(place: int) -> Row:
        lengths_N = None if lengths_BN is None else lengths_BN[place]
        row = read_row(reader, first + place, blocks=blocks, lengths_N=lengths_N)
        return dataclasses.replace(row, frames_nFHWC=shrink(row.frames_nFHWC))

    with concurrent.futures.ThreadPoolExecutor(config.data.decode_threads) as pool:
        reading = pool.map(read, range(config.data.batch_size))
        shown = tqdm(reading, total=config.data.batch_size, unit="row", disable=None)
        return list(shown)


def read_row(
    reader: BatchReader, number: int, *, blocks: np.ndarray, lengths_N: np.ndarray | None
) -> Row:
    """Global row `number`, with the frames of `blocks`."""
    config = reader.config
    per_block, side = block_tokens(config), config.video.resolution
    parts = reader.read_row(number)
    clips = reader.mixture.row(number)
    segments_N = parts["segment_ids"][::per_block]
    clip_N = np.repeat(np.arange(len(clips)), [clip.blocks for clip in clips])
    blocks_NLD = parts["patches"].reshape(len(segments_N), per_block, -1)
    named = [
        (clip, feed.name, feed.source.name(clip.item))
        for clip in clips
        for feed in (reader.feeds[clip.feed],)
    ]
    return Row(
        number=number,
        clips=named,
        segments_N=segments_N,
        clip_N=np.where(segments_N == 0, -1, clip_N),
        lengths_N=lengths_N,
        replaced=parts["faults"],
        frames_nFHWC=unpatchify(
            blocks_NLD[blocks],
            patch=tuple(config.model.patch),
            frames_per_block=config.video.frames_per_block,
            height=side,
            width=side,
        ),
    )


def batch_lengths(config: ml_collections.ConfigDict, step: int) -> np.ndarray:
    """int32 [B, N]: what the training step draws for its batch after `step` steps."""
    rows, blocks = config.data.batch_size, config.data.sequence_blocks

    def draw(step: jax.Array) -> jax.Array:
        mask_key, _, _ = step_keys(config, step)
        return keep_lengths(mask_key, jnp.arange(rows), blocks=blocks, config=config)

    return np.asarray(jax.jit(draw)(jnp.int32(step)))


def summarise_batch(
    config: ml_collections.ConfigDict, rows: list[Row], *, split: str, batch: int
) -> dict[str, Any]:
    """What `elastictok inspect-data --json` prints."""
    valid_BN = np.stack([row.segments_N for row in rows]) != 0
    kept: dict[str, float] = {}
    if rows[0].lengths_N is not None and valid_BN.any():
        lengths_BN = np.stack([row.lengths_N for row in rows if row.lengths_N is not None])
        kept = {"kept_fraction": float(lengths_BN[valid_BN].mean() / block_tokens(config))}
    return {
        "experiment": config.name,
        "split": split,
        "batch": batch,
        "tokens_per_block": block_tokens(config),
        "padding_fraction": float(1 - valid_BN.mean()),
        **kept,
        "replaced_blocks": sum(len(row.replaced) for row in rows),
        "rows": [row.summary() for row in rows],
    }
