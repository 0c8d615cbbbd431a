"""Batches by index: batch k is a function of (seed, k), so the position is one number.

Dimension key: B batch, N blocks, S tokens (N blocks x L), D values a patch.
"""

import dataclasses
import multiprocessing
import os
import queue
import threading
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
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


@dataclasses.dataclass(frozen=True)
class LocalPart:
    """The blocks of each global batch that the devices of a process hold, and no others: on a pod
    its devices are not neighbors in the mesh.

    Attributes:
      blocks: those of each row of the batch that it holds any of, all ascending.
      counted: the (row, block) whose damage this process counts, as the first that holds them.
    """

    blocks: dict[int, tuple[int, ...]]
    counted: frozenset[tuple[int, int]]

    @property
    def width(self) -> int:
        """Blocks of the row that has most."""
        return max(len(blocks) for blocks in self.blocks.values())


def whole_batch(config: ml_collections.ConfigDict) -> LocalPart:
    """All rows and blocks, as one process alone has them."""
    rows, blocks = range(config.data.batch_size), tuple(range(config.data.sequence_blocks))
    return LocalPart(
        dict.fromkeys(rows, blocks), frozenset((row, block) for row in rows for block in blocks)
    )


def local_part(
    sharding: NamedSharding, config: ml_collections.ConfigDict, *, process: int | None = None
) -> LocalPart:
    """What `process`, this one if not given, holds of global batches, blocks it holds in part
    included."""
    process = jax.process_index() if process is None else process
    shape, per_block = (config.data.batch_size, sequence_tokens(config)), block_tokens(config)
    first: dict[tuple[int, int], int] = {}  # process that holds a block
    held: dict[int, set[int]] = {}
    devices: Mapping[Any, Any] = sharding.devices_indices_map(shape)
    for device, index in devices.items():
        (top, bottom, _), (left, right, _) = (
            axis.indices(size) for axis, size in zip(index, shape, strict=True)
        )
        blocks = range(left // per_block, -(-right // per_block))
        for row in range(top, bottom):
            if device.process_index == process:
                held.setdefault(row, set()).update(blocks)
            for block in blocks:
                place = row, block
                first[place] = min(first.get(place, device.process_index), device.process_index)
    return LocalPart(
        {row: tuple(sorted(held[row])) for row in sorted(held)},
        frozenset(
            (row, block) for row in held for block in held[row] if first[row, block] == process
        ),
    )


class BatchReader:
    """Makes any batch, or any part of it, on request; holds no position.

    Args:
      split: "train" or "heldout".
      part: of each global batch that this process needs; all, if not given.
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
        part: LocalPart | None = None,
        first_row: int = 0,
    ):
        self.config, self.first_row = config, first_row
        # Looked up once: a ConfigDict takes as long for all of them as patching a small picture.
        self._batch_size, self._patch = config.data.batch_size, tuple(config.model.patch)
        self._block_tokens, self._patch_values = block_tokens(config), patch_values(config)
        self._frames_per_block = config.video.frames_per_block
        self._row_blocks = range(config.data.sequence_blocks)
        self.part = part or whole_batch(config)
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
        [b, s], and "faults", a list of messages, one for each block that had to be replaced.

        b are the rows of `part`, s the tokens of their blocks; a row with fewer ends in zeros.
        """
        first = self.first_row + index * self._batch_size
        tokens = self.part.width * self._block_tokens
        patches = np.zeros((len(self.part.blocks), tokens, self._patch_values), np.uint8)
        segment_ids = np.zeros((len(self.part.blocks), tokens), np.int32)
        faults: list[str] = []
        for place, (number, blocks) in enumerate(self.part.blocks.items()):
            mine = len(blocks) * self._block_tokens
            row = self.read_row(first + number, blocks=blocks, out=patches[place, :mine])
            segment_ids[place, :mine] = row["segment_ids"]
            faults += [
                fault
                for block, fault in zip(row["fault_blocks"], row["faults"], strict=True)
                if (number, block) in self.part.counted
            ]
        return {"patches": patches, "segment_ids": segment_ids, "faults": "\n".join(faults)}

    def read_row(
        self, row: int, *, blocks: Sequence[int] | None = None, out: np.ndarray | None = None
    ) -> dict[str, Any]:
        """Global row `row`, or those of its `blocks`, ascending: patches uint8 [s, D] (in `out`,
        if given), segment_ids int32 [s], "faults", and "fault_blocks" where they are."""
        clips = self.mixture.row(row)
        blocks = self._row_blocks if blocks is None else blocks
        per_block, patch, frames = self._block_tokens, self._patch, self._frames_per_block
        if out is None:
            out = np.empty((len(blocks) * per_block, self._patch_values), np.uint8)
        segments: list[int] = []  # of each block
        faults: list[str] = []
        fault_blocks: list[int] = []
        first = 0  # block of the row where the clip begins
        for number, clip in enumerate(clips, start=1):
            shift = clip.start - first
            for start, stop in _runs(blocks, first, first + clip.blocks):
                # A block at a time, while it is in the processor's cache.
                some = self.clips.read(clip, start + shift, stop + shift)
                for at, block in enumerate(some, start=start):
                    token = len(segments) * per_block
                    tokens = out[token : token + per_block]
                    patchify_into(tokens, block.frames, patch=patch, frames_per_block=frames)
                    segments.append(number)
                    if block.fault:
                        segments[-1] = len(clips) + 1 + at  # a clip of its own
                        faults.append(block.fault)
                        fault_blocks.append(at)
            first += clip.blocks
        rest = len(blocks) - len(segments)
        assert rest == 0
        return {
            "patches": out,
            "segment_ids": np.repeat(np.array(segments, np.int32), per_block),
            "faults": faults,
            "fault_blocks": fault_blocks,
        }


def _runs(blocks: Sequence[int], start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Those of ascending `blocks` in [start, stop), as ranges [first, last + 1) without gaps."""
    mine = blocks[bisect_left(blocks, start) : bisect_left(blocks, stop)]
    first = 0
    for last in range(1, len(mine) + 1):
        if last == len(mine) or mine[last] != mine[last - 1] + 1:
            yield mine[first], mine[last - 1] + 1
            first = last


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
    config, held = reader.config, reader.part.blocks
    shape, per_block = (config.data.batch_size, sequence_tokens(config)), block_tokens(config)
    places = {row: place for place, row in enumerate(held)}

    def place(part: np.ndarray) -> jax.Array:
        def shard(index) -> np.ndarray:
            (top, bottom, _), (left, right, _) = (
                axis.indices(size) for axis, size in zip(index, shape, strict=False)
            )

            def start(row: int) -> int:
                """Where the shard begins among the tokens held of a row."""
                return held[row].index(left // per_block) * per_block + left % per_block

            rows, size = range(top, bottom), right - left
            if len({start(row) for row in rows}) == 1:  # no copy
                return part[places[top] : places[top] + len(rows)][
                    :, start(top) : start(top) + size
                ]
            return np.stack([part[places[row], start(row) : start(row) + size] for row in rows])

        return jax.make_array_from_callback((*shape, *part.shape[2:]), sharding, shard)

    return {key: place(batch[key]) for key in ("patches", "segment_ids")}


class DeviceBatches:
    """Batches start, ..., stop - 1 on the devices, read and placed by a thread ahead of use.

    Args:
      before: blocks that could not be read and blocks read, by all processes, before the run was
        last stopped.

    Attributes:
      new_faults: what was wrong with blocks that could not be read, each once, since it was last
        emptied.
    """

    def __init__(
        self,
        reader: BatchReader,
        sharding: NamedSharding,
        *,
        start: int,
        stop: int,
        before: tuple[int, int] = (0, 0),
    ):
        self._before = before
        self._data = reader.config.data
        self._reader, self._sharding = reader, sharding
        self._queue: queue.Queue = queue.Queue(ON_DEVICE)
        self._closed = threading.Event()
        self._given = self._replaced = 0
        self._known: set[str] = set()
        self.new_faults: list[str] = []
        self._thread = threading.Thread(
            target=self._fill, args=(start, stop), name="batches", daemon=True
        )
        self._thread.start()

    @property
    def replaced(self) -> int:
        """Blocks so far that could not be read, of those that this process counts; process 0 has
        those from before, so that the sum over all is that of the run."""
        return self._replaced + (self._before[0] if jax.process_index() == 0 else 0)

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
        self._given += len(self._reader.part.counted)
        self._count(faults)
        return batch

    def _count(self, faults: list[str]) -> None:
        self._replaced += len(faults)
        for fault in faults:
            if fault not in self._known:
                self._known.add(fault)
                self.new_faults.append(fault)
        limit = self._data.max_bad_fraction
        # As if each process had had its share of what was before.
        replaced, given = (
            now + before / jax.process_count()
            for now, before in zip((self._replaced, self._given), self._before, strict=True)
        )
        if faults and replaced > limit * max(given, ENOUGH_BLOCKS):
            raise RunError(
                f"{replaced:.0f} of {given:.0f} blocks could not be read, more than "
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
