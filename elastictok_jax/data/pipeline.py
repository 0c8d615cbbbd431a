"""Batches by index: batch k is a function of (seed, k), so the position is one number.

Dimension key: B batch, N blocks, S tokens (N blocks x L), D values a patch.
"""

import multiprocessing
import os
import queue
import threading
from collections.abc import Iterator
from typing import Any

import grain
import jax
import ml_collections
import numpy as np
from absl import flags
from jax.sharding import NamedSharding

from elastictok_jax.config import block_tokens, patch_values, sequence_tokens
from elastictok_jax.ctrl_c import kept_from_children
from elastictok_jax.data.clips import ClipReader
from elastictok_jax.data.mixture import Mixture
from elastictok_jax.data.sources import Feeds
from elastictok_jax.errors import RunError, UsageError
from elastictok_jax.models.patching import patchify_into

Batch = dict[str, np.ndarray]
ON_DEVICE = 2  # batches that wait on the device, beside the one in use
JOIN_SECONDS = 5.0
ENOUGH_BLOCKS = 100  # to judge from what share of the data is damaged


class BatchReader:
    """Makes any batch, or any part of it, on request; holds no position.

    Args:
      split: "train" or "heldout".
      rows, blocks: the part of each global batch that this process needs; all, if not given.
      first_row: the global row that batch 0 begins with.

    Raises:
      UsageError: if the split has no data.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        feeds: Feeds,
        *,
        split: str,
        rows: range | None = None,
        blocks: range | None = None,
        first_row: int = 0,
    ):
        self.config, self.first_row = config, first_row
        # Looked up once: a ConfigDict takes as long for all of them as patching a small picture.
        self._batch_size, self._patch = config.data.batch_size, tuple(config.model.patch)
        self._block_tokens, self._patch_values = block_tokens(config), patch_values(config)
        self._frames_per_block = config.video.frames_per_block
        self.rows = range(config.data.batch_size) if rows is None else rows
        self.blocks = range(config.data.sequence_blocks) if blocks is None else blocks
        self.feeds = feeds.split(split)
        if not self.feeds:
            raise UsageError(
                f"the data sources ({', '.join(config.data.sources)}) have no {split} items: add "
                f"files, or change data.eval_fraction = {config.data.eval_fraction}"
            )
        self.mixture = Mixture(self.feeds, config, split=split)
        self.clips = ClipReader(self.feeds, config, split=split)

    def __call__(self, index: int) -> dict[str, Any]:
        """This process's part of batch `index`: patches uint8 [b, s, D], segment_ids int32
        [b, s], and "faults", a list of messages, one for each block that had to be replaced."""
        first = self.first_row + index * self._batch_size
        tokens = len(self.blocks) * self._block_tokens
        patches = np.empty((len(self.rows), tokens, self._patch_values), np.uint8)
        rows = [
            self.read_row(first + row, out=out) for row, out in zip(self.rows, patches, strict=True)
        ]
        return {
            "patches": patches,
            "segment_ids": np.stack([row["segment_ids"] for row in rows]),
            "faults": "\n".join(fault for row in rows for fault in row["faults"]),
        }

    def read_row(self, row: int, *, out: np.ndarray | None = None) -> dict[str, Any]:
        """Global row `row`: patches uint8 [s, D] (in `out`, if given), segment_ids int32 [s], and
        "faults"."""
        clips = self.mixture.row(row)
        per_block, patch, frames = self._block_tokens, self._patch, self._frames_per_block
        if out is None:
            out = np.empty((len(self.blocks) * per_block, self._patch_values), np.uint8)
        segments: list[int] = []  # of each block
        faults: list[str] = []
        first = 0  # block of the row where the clip begins
        for number, clip in enumerate(clips, start=1):
            start, stop = max(first, self.blocks.start), min(first + clip.blocks, self.blocks.stop)
            shift = clip.start - first
            # A block at a time, while it is in the processor's cache.
            blocks = self.clips.read(clip, start + shift, stop + shift)
            for at, block in enumerate(blocks, start=start):
                token = (at - self.blocks.start) * per_block
                tokens = out[token : token + per_block]
                patchify_into(tokens, block.frames, patch=patch, frames_per_block=frames)
                segments.append(number)
                if block.fault:
                    segments[-1] = len(clips) + 1 + at  # a clip of its own
                    faults.append(block.fault)
            first += clip.blocks
        return {
            "patches": out,
            "segment_ids": np.repeat(np.array(segments, np.int32), per_block),
            "faults": faults,
        }


def local_part(sharding: NamedSharding, config: ml_collections.ConfigDict) -> tuple[range, range]:
    """The rows and blocks of a global batch that this process's devices hold, if only in part."""
    shape = config.data.batch_size, sequence_tokens(config)
    indices = sharding.addressable_devices_indices_map(shape).values()
    spans = [
        [part.indices(size) for part, size in zip(index, shape, strict=True)]
        for index in indices
        if index is not None
    ]
    lows = [min(span[axis][0] for span in spans) for axis in (0, 1)]
    highs = [max(span[axis][1] for span in spans) for axis in (0, 1)]
    per_block = block_tokens(config)
    return range(lows[0], highs[0]), range(lows[1] // per_block, -(-highs[1] // per_block))


def read_ahead(reader: BatchReader, *, start: int, stop: int) -> Iterator[dict[str, Any]]:
    """Batches start, ..., stop - 1 in order, read ahead of use in threads, or in
    `data.workers` processes that each have such threads. O(1) to seek."""
    data = reader.config.data
    ahead = max(data.prefetch, data.decode_threads)
    options = grain.ReadOptions(num_threads=data.decode_threads, prefetch_buffer_size=ahead)
    dataset = grain.MapDataset.range(start, stop).map(reader).to_iter_dataset(options)
    if data.workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain looks at its own flags, which nobody gave
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=data.workers, per_worker_buffer_size=1),
            worker_init_fn=end_with_parent,
        )
        return _from_workers(iter(dataset))
    return iter(dataset)


def _from_workers(batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """`batches`, whose processes start when the first is asked for."""
    with kept_from_children():
        first = next(batches, None)
    if first is not None:
        yield first
        yield from batches


def end_with_parent(worker: int, workers: int) -> None:
    """Has a worker process end when its parent does, also when that is killed."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="end with parent", daemon=True).start()


def to_device(batch: Batch, reader: BatchReader, sharding: NamedSharding) -> dict[str, jax.Array]:
    """A reader's part of a batch as shards of global uint8 and int32 [B, S, ...] arrays."""
    config = reader.config
    shape = config.data.batch_size, sequence_tokens(config)
    corner = reader.rows.start, reader.blocks.start * block_tokens(config)

    def place(part: np.ndarray) -> jax.Array:
        def shard(index) -> np.ndarray:
            cut = [
                slice(low - first, high - first)
                for (low, high, _), first in zip(
                    (axis.indices(size) for axis, size in zip(index, shape, strict=False)),
                    corner,
                    strict=True,
                )
            ]
            return part[tuple(cut)]

        return jax.make_array_from_callback((*shape, *part.shape[2:]), sharding, shard)

    return {key: place(batch[key]) for key in ("patches", "segment_ids")}


class DeviceBatches:
    """Batches start, ..., stop - 1 on the devices, read and placed by a thread ahead of use.

    Attributes:
      replaced: blocks so far that could not be read, of those that this process was given.
      new_faults: what was wrong with them, each once, since it was last emptied.
    """

    def __init__(self, reader: BatchReader, sharding: NamedSharding, *, start: int, stop: int):
        self._data = reader.config.data
        self._reader, self._sharding = reader, sharding
        self._queue: queue.Queue = queue.Queue(ON_DEVICE)
        self._closed = threading.Event()
        self._given = 0
        self.replaced = 0
        self._known: set[str] = set()
        self.new_faults: list[str] = []
        self._thread = threading.Thread(
            target=self._fill, args=(start, stop), name="batches", daemon=True
        )
        self._thread.start()

    def __next__(self) -> dict[str, jax.Array]:
        """The next batch.

        Raises:
          RunError: if a worker process has died, reading failed, no batch has come for
            `data.timeout_seconds`, or more than `data.max_bad_fraction` could not be read.
        """
        try:
            batch, faults = self._queue.get(timeout=self._data.timeout_seconds)
        except queue.Empty:
            raise RunError(
                f"no batch was read in data.timeout_seconds = {self._data.timeout_seconds:g}: the "
                "storage or a file hangs; see which with a stack dump (py-spy), or raise the limit"
            ) from None
        if isinstance(batch, BaseException):
            raise RunError(f"reading the data failed: {batch}") from batch
        self._given += len(self._reader.rows) * len(self._reader.blocks)
        self._count(faults)
        return batch

    def _count(self, faults: list[str]) -> None:
        self.replaced += len(faults)
        for fault in faults:
            if fault not in self._known:
                self._known.add(fault)
                self.new_faults.append(fault)
        limit = self._data.max_bad_fraction
        if self.replaced > limit * max(self._given, ENOUGH_BLOCKS):
            raise RunError(
                f"{self.replaced} of {self._given} blocks could not be read, more than "
                f"data.max_bad_fraction = {limit:g} allows; the last: {faults[-1]}"
            )

    def _fill(self, start: int, stop: int) -> None:
        try:
            for batch in read_ahead(self._reader, start=start, stop=stop):
                faults = batch["faults"].splitlines()
                self._put((to_device(batch, self._reader, self._sharding), faults))
                if self._closed.is_set():
                    return
        except BaseException as error:  # whatever it is, the loop must hear of it
            self._put((error, []))

    def _put(self, entry: tuple[Any, list[str]]) -> None:
        while not self._closed.is_set():
            try:
                return self._queue.put(entry, timeout=0.2)
            except queue.Full:
                continue

    def close(self) -> None:
        """Stops reading."""
        self._closed.set()
        self._thread.join(timeout=JOIN_SECONDS)  # a read that hangs must not hold up the exit
