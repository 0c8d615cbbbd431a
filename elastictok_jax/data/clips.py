"""Pixels of clips: frame rate, crop and flip; and what stands in for blocks that are damaged.

Dimensions: T frames, R = video.resolution pixels.
"""

import dataclasses
import threading

import ml_collections
import numpy as np

from elastictok_jax.data.media import MediaError
from elastictok_jax.data.mixture import frame_step
from elastictok_jax.data.packing import Clip
from elastictok_jax.data.sources import SPLITS, Feed

WIDEST = 16 / 9  # assumed of frames when it is asked whether a source fits in memory
SUBSTITUTES = 8  # items that are tried in place of a damaged one


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A run of blocks that was read.

    Attributes:
      frames: uint8 [T, R, R, 3].
      faults: what was wrong, by the number of the block in the clip.
    """

    frames: np.ndarray
    faults: dict[int, str]


class ClipReader:
    """Reads blocks of clips: a function of (seed, split, clip, block) and the data.

    Sources of which all items fit in what is left of `data.cache_mib` are decoded once and kept.
    """

    def __init__(self, feeds: tuple[Feed, ...], config: ml_collections.ConfigDict, *, split: str):
        self._feeds, self._side = feeds, config.video.resolution
        self._frames_per_block = config.video.frames_per_block
        self._training = split == "train"
        self._seed = [config.seed, SPLITS.index(split)]
        room = config.data.cache_mib * 2**20 / max(1, config.data.workers)
        self._kept: list[dict[int, np.ndarray] | None] = []
        for feed in feeds:
            side = self._read_side(feed)
            size = int(feed.source.frames[feed.items].sum()) * side * side * WIDEST * 3
            self._kept.append({} if size <= room else None)
            room -= size if size <= room else 0
        self._lock = threading.Lock()

    def read(self, clip: Clip, start: int, stop: int) -> Blocks:
        """Blocks start, ..., stop - 1 of an item.

        A video is read at its own rate or at `fps` of its source; an image, and a video shorter
        than a block, repeats its last frame. A block that cannot be read is replaced by one of
        the next readable item of the source, alone: which blocks are asked for together changes
        nothing. Where none of SUBSTITUTES items is readable it is left black.
        """
        try:
            return Blocks(self._read(clip, start, stop), {})
        except MediaError as error:
            if stop - start > 1:
                pieces = [self.read(clip, block, block + 1) for block in range(start, stop)]
                faults = {k: v for piece in pieces for k, v in piece.faults.items()}
                return Blocks(np.concatenate([piece.frames for piece in pieces]), faults)
            return Blocks(self._substitute(clip), {start: str(error)})

    def _substitute(self, clip: Clip) -> np.ndarray:
        items = self._feeds[clip.feed].items
        place = int(np.searchsorted(items, clip.item))
        for step in range(1, SUBSTITUTES + 1):
            item = int(items[(place + step) % len(items)])
            try:
                return self._read(dataclasses.replace(clip, item=item), 0, 1)
            except MediaError:
                continue
        return np.zeros((self._frames_per_block, self._side, self._side, 3), np.uint8)

    def _read(self, clip: Clip, start: int, stop: int) -> np.ndarray:
        """uint8 [T, R, R, 3], or MediaError."""
        feed, per_block, side = self._feeds[clip.feed], self._frames_per_block, self._side
        total = int(feed.source.frames[clip.item])
        step = float(frame_step(feed, np.array(clip.item)))
        available = int(np.ceil(total / step))
        # Drawn for the whole item, so that its blocks agree whoever reads which.
        across, down, flip, phase = 0.5, 0.5, False, 0
        if self._training:
            rng = np.random.default_rng([*self._seed, feed.seed, clip.epoch, clip.item])
            phase = int(rng.integers(available % per_block + 1)) if available > per_block else 0
            flip = bool(feed.settings.flip and rng.random() < 0.5)
            if feed.settings.crop == "random":
                across, down = rng.random(2)
        wanted = phase + np.arange(start * per_block, stop * per_block)
        wanted = np.minimum(np.floor(wanted * step + 0.5).astype(np.int64), total - 1)
        distinct = wanted[: len(wanted) - int((wanted == wanted[-1]).sum()) + 1]
        frames = self._decode(clip.feed, clip.item, distinct)
        top = round(down * (frames.shape[1] - side))
        left = round(across * (frames.shape[2] - side))
        frames = frames[:, top : top + side, left : left + side]
        if flip:
            frames = frames[:, :, ::-1]
        if len(distinct) == len(wanted):
            return frames
        return np.concatenate([frames, np.repeat(frames[-1:], len(wanted) - len(distinct), axis=0)])

    def _read_side(self, feed: Feed) -> int:
        return feed.settings.resolution or self._side

    def _decode(self, feed_index: int, item: int, indices: np.ndarray) -> np.ndarray:
        """Frames at `indices`, shortest side resized."""
        feed, kept = self._feeds[feed_index], self._kept[feed_index]
        side = self._read_side(feed)
        if kept is None:
            return feed.source.read(item, indices, side=side)
        if item not in kept:
            with self._lock:  # one thread decodes it, the others wait for that
                if item not in kept:
                    everything = np.arange(feed.source.frames[item])
                    kept[item] = feed.source.read(item, everything, side=side)
        frames = kept[item]
        if indices[-1] - indices[0] == len(indices) - 1:
            return frames[indices[0] : indices[-1] + 1]  # a view
        return frames[indices]

    def __getstate__(self) -> dict:
        state = self.__dict__ | {"_kept": [None if kept is None else {} for kept in self._kept]}
        del state["_lock"]
        return state

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()
