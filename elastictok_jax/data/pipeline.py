"""Batches by index: batch k is a function of (seed, k), so the position is one number.

Dimension key: B batch, S tokens, D values a patch, T frames.
"""

import collections
import threading
from collections.abc import Iterable, Iterator
from functools import partial

import grain
import jax
import ml_collections
import numpy as np
from jax.sharding import NamedSharding

from elastictok_jax.config import block_tokens
from elastictok_jax.data import media
from elastictok_jax.data.packing import Clip, pack_row
from elastictok_jax.data.sources import Source, open_source
from elastictok_jax.errors import UsageError
from elastictok_jax.models.patching import patchify

Batch = dict[str, np.ndarray]


OPEN_VIDEOS = 32  # per thread; opening a video demuxes it once for its index


class ClipReader:
    """Reads clips at the training resolution.

    Files are decoded once and kept, resized, as long as they fit in `cache_bytes`, in the order
    of `files`; from the others just the frames of a clip are decoded, each time.
    """

    def __init__(
        self,
        files: Iterable[media.MediaInfo],
        *,
        frames_per_block: int,
        resolution: int,
        cache_bytes: int,
    ):
        self._frames_per_block, self._resolution = frames_per_block, resolution
        self._local = threading.local()  # a VideoReader serves one thread
        self._kept: dict[str, np.ndarray] = {}
        self._locks = {}
        for info in files:
            pixels = resolution**2 * max(info.height, info.width) // min(info.height, info.width)
            size = info.frames * pixels * 3
            if size <= cache_bytes:
                cache_bytes -= size
                self._locks[info.path] = threading.Lock()

    def read(self, clip: Clip) -> np.ndarray:
        """uint8 [T, R, R, 3]: whole blocks, shortest side resized to R, then cropped.

        An image, or a video shorter than a block, repeats its last frame.
        """
        side, wanted = self._resolution, clip.blocks * self._frames_per_block
        count = min(wanted, clip.info.frames - clip.start)
        frames = self._read(clip.info, clip.start, count)
        top = round(clip.down * (frames.shape[1] - side))
        left = round(clip.across * (frames.shape[2] - side))
        frames = frames[:, top : top + side, left : left + side]
        if clip.flip:
            frames = frames[:, :, ::-1]
        return np.concatenate([frames, np.repeat(frames[-1:], wanted - count, axis=0)])

    def _read(self, info: media.MediaInfo, start: int, count: int) -> np.ndarray:
        """Frames start, ..., start + count - 1, shortest side resized."""
        if info.path not in self._locks:
            return self._decode(info, start, count)
        with self._locks[info.path]:  # one thread decodes it, the others wait for that
            if info.path not in self._kept:
                self._kept[info.path] = self._decode(info, 0, info.frames)
        return self._kept[info.path][start : start + count]

    def _decode(self, info: media.MediaInfo, start: int, count: int) -> np.ndarray:
        if info.kind == "image":
            return media.read_frames(info.path, side=self._resolution)
        return self._open(info.path).read_resized(start, count, side=self._resolution)

    def _open(self, path: str) -> media.VideoReader:
        if not hasattr(self._local, "videos"):
            self._local.videos = collections.OrderedDict()
        videos = self._local.videos
        if path not in videos:
            videos[path] = media.VideoReader(path)
            if len(videos) > OPEN_VIDEOS:
                videos.popitem(last=False)[1].close()
        videos.move_to_end(path)
        return videos[path]


class BatchReader:
    """Makes the rows of any batch on request; holds no position.

    Args:
      split: "train" or "heldout".
      rows: the rows of each global batch that this process needs.
      first_row: the global row that batch 0 begins with.
    """

    def __init__(
        self, config: ml_collections.ConfigDict, *, split: str, rows: range, first_row: int = 0
    ):
        self.config, self.split, self.rows, self.first_row = config, split, rows, first_row
        self.source: Source = open_source(config, split=split)
        self._clips = ClipReader(
            (*self.source.videos, *self.source.images),
            frames_per_block=config.video.frames_per_block,
            resolution=config.video.resolution,
            cache_bytes=config.data.cache_mib * 2**20,
        )
        if not self.source.images and not self.source.videos:
            raise UsageError(
                f"data source {config.data.source} has no {split} files: add files, or change "
                f"data.eval_fraction = {config.data.eval_fraction}"
            )

    def __call__(self, index: int) -> Batch:
        """Batch `index`: patches uint8 [b, S, D], segment_ids int32 [b, S], b = len(rows)."""
        first = self.first_row + index * self.config.data.batch_size
        rows = [self.read_row(first + row) for row in self.rows]
        return {key: np.stack([row[key] for row in rows]) for key in rows[0]}

    def read_row(self, row: int) -> Batch:
        """Global row `row`: patches uint8 [S, D], segment_ids int32 [S]."""
        config = self.config
        clips = pack_row(self.source, row, split=self.split, config=config)
        video = np.concatenate([self._clips.read(clip) for clip in clips])
        patch, frames = tuple(config.model.patch), config.video.frames_per_block
        patches = patchify(video, patch=patch, frames_per_block=frames)
        lengths = [clip.blocks * block_tokens(config) for clip in clips]
        segments = np.repeat(np.arange(1, len(clips) + 1, dtype=np.int32), lengths)
        return {"patches": np.ascontiguousarray(patches), "segment_ids": segments}


def local_rows(sharding: NamedSharding, batch_size: int) -> range:
    """The rows of a global batch that this process's devices hold."""
    indices = sharding.addressable_devices_indices_map((batch_size, 1)).values()
    spans = [index[0].indices(batch_size) for index in indices if index is not None]
    return range(min(span[0] for span in spans), max(span[1] for span in spans))


def read_ahead(reader: BatchReader, *, start: int, stop: int) -> Iterator[Batch]:
    """Batches start, ..., stop - 1 in order, read in threads ahead of use. O(1) to seek."""
    data = reader.config.data
    options = grain.ReadOptions(
        num_threads=data.decode_threads, prefetch_buffer_size=max(data.prefetch, 1)
    )
    dataset = grain.MapDataset.range(start, stop).map(reader)
    return iter(dataset.to_iter_dataset(options))


def to_device(batch: Batch, sharding: NamedSharding) -> dict[str, jax.Array]:
    """This process's rows as shards of global [B, S, ...] arrays."""
    place = partial(jax.make_array_from_process_local_data, sharding)
    return {key: place(value) for key, value in batch.items()}
