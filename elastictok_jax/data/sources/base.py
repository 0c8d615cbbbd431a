"""Defines what a data source offers, and which of its items are held out from training."""

import hashlib
from typing import Protocol

import numpy as np


class Source(Protocol):
    """Gives random access to items (images and videos); thread-safe and picklable.

    Attributes, one entry per item:
      is_video: bool [n].
      frames: int64 [n], 1 for an image.
      fps: float64 [n], frames a second, 0 for an image.
      place: uint64 [n], hash of the original's name, which decides its split.
      fingerprint: 16 hex digits, of the list of items.
    """

    is_video: np.ndarray
    frames: np.ndarray
    fps: np.ndarray
    place: np.ndarray
    fingerprint: str

    def name(self, item: int) -> str:
        """Returns the name of an item for messages and figures."""
        ...

    def read(self, item: int, indices: np.ndarray, *, side: int) -> np.ndarray:
        """Reads frames at ascending `indices`: uint8 [T, H, W, 3], min(H, W) = side.

        A strip is cropped by `media.crop_long_strip`.

        Raises:
          MediaError: naming the item and what is wrong with it.
        """
        ...


def name_hash(name: str) -> int:
    """Returns a hash of `name`, uniform over [0, 2^64)."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def held_out(place: np.ndarray, *, fraction: float) -> np.ndarray:
    """Returns which items are held out from training, a `fraction` by hash: bool [n].

    The split depends on the original's name alone, so adding files moves none, and all clips of
    one original are on one side. The exception is a small data set where chance picks no or all
    originals: then the one with the lowest hash is held out, or the one with the highest is not.
    """
    chosen = place < np.uint64(min(fraction * 2.0**64, 2.0**64 - 2048))
    if len(place) and chosen.all():
        chosen &= place != place.max()
    if not chosen.any() and fraction > 0 and (place != place[:1]).any():
        chosen = place == place.min()
    return chosen
