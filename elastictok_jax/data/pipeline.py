"""Reads batches by index: batch k is a function of (seed, k), so the position is one number.

Dimension key: B rows, N blocks of a row, P inputs of a block, S inputs of a row (N x P), D values
of an input.
"""

import copy
import multiprocessing
import os
import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import jax
import ml_collections
import numpy as np
from absl import flags
from jax.sharding import NamedSharding

from elastictok_jax.ctrl_c import keep_ctrl_c_from_children
from elastictok_jax.data.batch_sharding import BatchPart, batch_to_device
from elastictok_jax.data.clip_reader import ClipReader
from elastictok_jax.data.mixture import Mixture
from elastictok_jax.data.sources.splits import SourceSplits
from elastictok_jax.errors import RunError, UsageError
from elastictok_jax.models.base import Codec

Batch = dict[str, np.ndarray]
ON_DEVICE = 2  # batches ready on the device, besides the one in use
JOIN_SECONDS = 5.0
ENOUGH_BLOCKS = 100  # to judge from which fraction of the data is damaged


def _complete_batch(config: ml_collections.ConfigDict) -> BatchPart:
    """All of a batch."""
    needed_BN = np.ones((config.data.batch_size, config.data.sequence_blocks), bool)
    return BatchPart(needed_BN, needed_BN)


class BatchReader:
    """Makes any batch, or any part of one, by index; it has no position.

    Args:
      split: "train" or "heldout".
      part: the part of each global batch that this process needs; default all of it.
      first_row: the first global row of batch 0.

    Raises:
      UsageError: if the split has no data.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        feeds: SourceSplits,
        *,
        codec: Codec,
        split: str,
        part: BatchPart | None = None,
        first_row: int = 0,
    ):
        self.config, self.codec, self.geometry = config, codec, codec.geometry
        self.first_row = first_row
        self._batch_size = config.data.batch_size  # read once: a ConfigDict is slow
        self.part = _complete_batch(config) if part is None else part
        self.feeds = feeds.split(split)
        if not self.feeds:
            raise UsageError(
                f"the data sources ({', '.join(config.data.sources)}) have no {split} items: add "
                f"files, or change data.eval_fraction = {config.data.eval_fraction}"
            )
        self.mixture = Mixture(self.feeds, config, split=split)
        self.clips = ClipReader(self.feeds, config, split=split)

    def __call__(self, index: int) -> dict[str, Any]:
        """Returns this process's part of batch `index`.

        "patches" uint8 [n, s, D] and "segment_ids" int32 [n, s] are the part as n stretches of
        equal length (`BatchPart.stretch`), in the order of rows and blocks; of a complete batch
        these are its rows. "faults" has a line for each counted block that had to be replaced.
        """
        first = self.first_row + index * self._batch_size
        needed_BN, counted_BN = self.part.needed_BN, self.part.counted_BN
        per_block = self.geometry.inputs
        stretch = self.part.stretch * per_block
        count = int(needed_BN.sum()) * per_block
        patches = np.empty((count, self.geometry.input_values), np.uint8)
        segment_ids = np.empty(count, np.int32)
        faults: list[str] = []
        done = 0
        for row in np.flatnonzero(needed_BN.any(axis=1)):
            blocks = np.flatnonzero(needed_BN[row])
            here = slice(done, done + len(blocks) * per_block)
            read = self.read_row(first + int(row), blocks=blocks.tolist(), out=patches[here])
            segment_ids[here] = read["segment_ids"]
            faults += [fault for at, fault in read["faults"].items() if counted_BN[row, at]]
            done = here.stop
        return {
            "patches": patches.reshape(-1, stretch, self.geometry.input_values),
            "segment_ids": segment_ids.reshape(-1, stretch),
            "faults": "\n".join(faults),
        }

    def from_row(self, first_row: int) -> "BatchReader":
        """Returns a reader whose batch 0 starts with global row `first_row`."""
        reader = copy.copy(self)
        reader.first_row = first_row
        return reader

    def read_row(
        self, row: int, *, blocks: Sequence[int] | None = None, out: np.ndarray | None = None
    ) -> dict[str, Any]:
        """Reads `blocks`, ascending, of global row `row`; default all of them.

        Returns:
          patches uint8 [s, D] (in `out`, if given), segment_ids int32 [s], and faults, a message
          by block for each block that had to be replaced.
        """
        clips = self.mixture.row(row)
        per_block = self.geometry.inputs
        if blocks is None:
            blocks = range(self.part.needed_BN.shape[1])
        if out is None:
            out = np.empty((len(blocks) * per_block, self.geometry.input_values), np.uint8)
        segments: list[int] = []  # of each block
        faults: dict[int, str] = {}
        first = 0  # block of the row where the clip starts
        for number, clip in enumerate(clips, start=1):
            inside = [at for at in blocks if first <= at < first + clip.blocks]
            # One block at a time, while it is in the CPU cache.
            read = self.clips.read(clip, [clip.start + at - first for at in inside])
            for at, block in zip(inside, read, strict=True):
                token = len(segments) * per_block
                self.codec.pack(block.frames, out=out[token : token + per_block])
                segments.append(number)
                if block.fault:
                    segments[-1] = len(clips) + 1 + at  # a separate clip
                    faults[at] = block.fault
            first += clip.blocks
        return {
            "patches": out,
            "segment_ids": np.repeat(np.array(segments, np.int32), per_block),
            "faults": faults,
        }


def read_ahead(reader: BatchReader, *, start: int, stop: int) -> Iterator[dict[str, Any]]:
    """Yields batches start, ..., stop - 1, read ahead in threads; the start costs O(1).

    With `data.workers`, that many processes run such threads.
    """
    data = reader.config.data
    ahead = max(data.prefetch, data.decode_threads)
    options = grain.ReadOptions(num_threads=data.decode_threads, prefetch_buffer_size=ahead)
    dataset = grain.MapDataset.range(start, stop).map(reader).to_iter_dataset(options)
    if data.workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain reads its own flags, which are not parsed here
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=data.workers, per_worker_buffer_size=1),
            worker_init_fn=_end_with_parent,
        )
        return _from_workers(iter(dataset))
    return iter(dataset)


def _from_workers(batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields `batches`; their processes start with the first request."""
    with keep_ctrl_c_from_children():
        first = next(batches, None)
    if first is not None:
        yield first
        yield from batches


def _end_with_parent(worker: int, workers: int) -> None:
    """Makes a worker process end with its parent, even if that is killed."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="end with parent", daemon=True).start()


class DeviceBatches:
    """Iterates over batches start, ..., stop - 1 on the devices, placed ahead of use by a thread.

    Args:
      replaced_before: blocks of all processes that could not be read before the run was resumed.
        With the rows before `reader.first_row` they count towards the limit on damage, so that
        a long run that resumes at a damaged file is not stopped by it.

    Attributes:
      replaced: counted blocks so far that could not be read.
      new_faults: messages on them, each once, since the list was last cleared.
    """

    def __init__(
        self,
        reader: BatchReader,
        sharding: NamedSharding,
        *,
        start: int,
        stop: int,
        replaced_before: int = 0,
    ):
        self._data = reader.config.data
        self._reader, self._sharding = reader, sharding
        self._queue: queue.Queue = queue.Queue(ON_DEVICE)
        self._closed = threading.Event()
        # The fraction of all blocks, also of those before, that this process counts.
        fraction = float(reader.part.counted_BN.mean())
        self._given = round(fraction * reader.first_row * self._data.sequence_blocks)
        self._replaced_before = round(fraction * replaced_before)
        self.replaced = 0
        self._known: set[str] = set()
        self.new_faults: list[str] = []
        self._thread = threading.Thread(
            target=self._fill, args=(start, stop), name="batches", daemon=True
        )
        self._thread.start()

    def __next__(self) -> dict[str, jax.Array]:
        """Returns the next batch.

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
        self._given += int(self._reader.part.counted_BN.sum())
        self._count(faults)
        return batch

    def _count(self, faults: list[str]) -> None:
        self.replaced += len(faults)
        for fault in faults:
            if fault not in self._known:
                self._known.add(fault)
                self.new_faults.append(fault)
        limit = self._data.max_bad_fraction
        replaced = self._replaced_before + self.replaced
        if faults and replaced > limit * max(self._given, ENOUGH_BLOCKS):
            raise RunError(
                f"{replaced} of {self._given} blocks could not be read, more than "
                f"data.max_bad_fraction = {limit:g} allows; the last: {faults[-1]}"
            )

    def _fill(self, start: int, stop: int) -> None:
        try:
            for batch in read_ahead(self._reader, start=start, stop=stop):
                placed = batch_to_device(
                    batch,
                    part=self._reader.part,
                    sharding=self._sharding,
                    block_inputs=self._reader.geometry.inputs,
                )
                self._put((placed, batch["faults"].splitlines()))
                if self._closed.is_set():
                    return
        except BaseException as error:  # any error must reach the loop
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
        self._thread.join(timeout=JOIN_SECONDS)  # a read that hangs must not block the exit
