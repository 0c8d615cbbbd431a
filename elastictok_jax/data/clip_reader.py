"""Reads the pixels of clips: applies frame rate, crop and flip, and replaces damaged blocks.

Dimensions: F frames a block, R = video.resolution pixels.
"""

import dataclasses
import hashlib
import struct
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from typing import NamedTuple

import ml_collections
import numpy as np

from elastictok_jax.data.frame_rate import count_frames_at_rate, recorded_frames_at_rate
from elastictok_jax.data.media import MediaError
from elastictok_jax.data.mixture import mixture_frame_step
from elastictok_jax.data.packing import PackedClip
from elastictok_jax.data.sources.splits import SPLITS, SourceSplit

WIDEST = 16 / 9  # assumed aspect of frames when estimating the memory of a source
SUBSTITUTES = 8  # items tried in place of a damaged one


class ClipBlock(NamedTuple):
    """A block of pixels.

    Attributes:
      frames: uint8 [F, R, R, 3].
      fault: what is wrong with the block that these frames replace, else empty.
    """

    frames: np.ndarray
    fault: str


class _View(NamedTuple):
    """How an item is sampled in an epoch.

    Attributes:
      step: recorded frames from one to the next.
      across, down: offset of the crop as a fraction of the slack, in [0, 1]; flip: mirrored.
    """

    step: float
    across: float
    down: float
    flip: bool


def _mirrored(frames_FHWC: np.ndarray) -> np.ndarray:
    mirrored = np.empty(frames_FHWC.shape, np.uint8)
    for channel in range(3):  # four times as fast as all at once
        mirrored[..., channel] = frames_FHWC[:, :, ::-1, channel]
    return mirrored


class ClipReader:
    """Reads blocks of clips, as a function of (seed, split, clip, block) and the data.

    Training sources whose items all fit into the rest of `data.cache_mib` are decoded once and
    cached, faults of damaged items included. Held-out blocks are read once and never cached.
    """

    def __init__(
        self, feeds: tuple[SourceSplit, ...], config: ml_collections.ConfigDict, *, split: str
    ):
        self._feeds, self._side = feeds, config.video.resolution
        self._frames_per_block = config.video.frames_per_block
        self._training = split == "train"
        self._seed = [config.seed, SPLITS.index(split)]
        room = config.data.cache_mib * 2**20 / max(1, config.data.workers)
        self._kept: list[dict[int, Future[np.ndarray | str]] | None] = []
        for feed in feeds:
            side = self._read_side(feed)
            size = int(feed.source.frames[feed.items].sum()) * side * side * WIDEST * 3
            fits = self._training and size <= room
            self._kept.append({} if fits else None)
            room -= size if fits else 0
        self._lock = threading.Lock()

    def read(self, clip: PackedClip, blocks: Iterable[int]) -> Iterator[ClipBlock]:
        """Yields blocks of an item.

        A video is read at its own rate or at `fps` of its source; an image, and a video shorter
        than a block, repeats its last frame. A block that cannot be read is replaced by the first
        block of the next readable item of the source, or by black if none of SUBSTITUTES items is
        readable.
        """
        view = self._view(clip)
        for block in blocks:
            try:
                yield ClipBlock(self._read(clip, view, block), "")
            except MediaError as error:
                yield ClipBlock(self._substitute(clip), str(error))

    def read_frames(self, clip: PackedClip, *, most: int) -> np.ndarray:
        """Reads the first `most` frames of an item, or all of fewer: uint8 [T, R, R, 3].

        They are those of `read` without repeats. Raises MediaError.
        """
        view = self._view(clip)
        frames = self._feeds[clip.feed].source.frames[clip.item]
        count = min(most, int(count_frames_at_rate(frames, view.step)))
        return self._frames(clip, view, self._recorded(clip, view, np.arange(count)))

    def _substitute(self, clip: PackedClip) -> np.ndarray:
        items = self._feeds[clip.feed].items
        place = int(np.searchsorted(items, clip.item))
        for step in range(1, SUBSTITUTES + 1):
            other = dataclasses.replace(clip, item=int(items[(place + step) % len(items)]))
            try:
                return self._read(other, self._view(other), 0)
            except MediaError:
                continue
        return np.zeros((self._frames_per_block, self._side, self._side, 3), np.uint8)

    def _view(self, clip: PackedClip) -> _View:
        """Draws the view of an item, so that all its blocks agree whichever process reads them."""
        feed = self._feeds[clip.feed]
        step = float(mixture_frame_step(feed, np.array(clip.item)))
        if not self._training:
            return _View(step, 0.5, 0.5, False)
        # A hash, as creating a numpy generator takes a tenth of the time to decode an image.
        key = repr([*self._seed, feed.seed, clip.epoch, clip.item]).encode()
        words = struct.unpack("<3Q", hashlib.blake2b(key, digest_size=24).digest())
        flip, across, down = (word / 2**64 for word in words)
        if feed.settings.crop != "random":
            across = down = 0.5
        return _View(step, across, down, feed.settings.flip and flip < 0.5)

    def _read(self, clip: PackedClip, view: _View, block: int) -> np.ndarray:
        """Reads a block: uint8 [F, R, R, 3]; raises MediaError."""
        per_block, side = self._frames_per_block, self._side
        numbers = np.arange(block * per_block, (block + 1) * per_block)
        wanted = self._recorded(clip, view, numbers)
        distinct = wanted[: per_block - int((wanted == wanted[-1]).sum()) + 1]
        frames = self._frames(clip, view, distinct)
        if len(distinct) == per_block:
            return frames
        if len(distinct) == 1:  # an image: no copies
            return np.broadcast_to(frames, (per_block, side, side, 3))
        return np.concatenate([frames, np.repeat(frames[-1:], per_block - len(distinct), axis=0)])

    def _recorded(self, clip: PackedClip, view: _View, numbers: np.ndarray) -> np.ndarray:
        frames = int(self._feeds[clip.feed].source.frames[clip.item])
        return recorded_frames_at_rate(numbers, step=view.step, frames=frames)

    def _frames(self, clip: PackedClip, view: _View, indices: np.ndarray) -> np.ndarray:
        """Reads recorded frames at `indices`, cropped and maybe mirrored: uint8 [T, R, R, 3]."""
        frames, side = self._decode(clip.feed, clip.item, indices), self._side
        top = round(view.down * (frames.shape[1] - side))
        left = round(view.across * (frames.shape[2] - side))
        frames = frames[:, top : top + side, left : left + side]
        return _mirrored(frames) if view.flip else frames

    def _read_side(self, feed: SourceSplit) -> int:
        return feed.settings.resolution or self._side

    def _decode(self, feed_index: int, item: int, indices: np.ndarray) -> np.ndarray:
        """Decodes frames at `indices`, resized to the read side."""
        feed, kept = self._feeds[feed_index], self._kept[feed_index]
        side = self._read_side(feed)
        if kept is None:
            return feed.source.read(item, indices, side=side)
        frames = self._decode_once(feed, item, kept, side=side)
        if indices[-1] - indices[0] == len(indices) - 1:
            return frames[indices[0] : indices[-1] + 1]  # a view
        return frames[indices]

    def _decode_once(
        self, feed: SourceSplit, item: int, kept: dict[int, Future[np.ndarray | str]], *, side: int
    ) -> np.ndarray:
        """Returns all frames of an item, from the cache after the first call.

        The first thread to ask decodes the item while others wait. A MediaError is cached as its
        message.
        """
        with self._lock:
            first = item not in kept
            future = kept.setdefault(item, Future())
        if first:
            try:
                everything = np.arange(feed.source.frames[item])
                future.set_result(feed.source.read(item, everything, side=side))
            except MediaError as error:
                future.set_result(str(error))
            except BaseException as error:  # waiting threads must get any error
                future.set_exception(error)
                raise
        frames = future.result()
        if isinstance(frames, str):
            raise MediaError(frames)
        return frames

    def __getstate__(self) -> dict:
        state = self.__dict__ | {"_kept": [None if kept is None else {} for kept in self._kept]}
        del state["_lock"]
        return state

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()
