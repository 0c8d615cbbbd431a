"""Defines what a data source offers."""

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
