"""Defines the errors, limits and checks of images and videos."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from elastictok_jax.errors import UsageError
from elastictok_jax.storage.atomic import replacing


class MediaError(UsageError):
    """A media file is missing, damaged or unsuitable; names the file, the fault and the fix."""


@dataclass(frozen=True)
class MediaLimits:
    """Bounds above which a file is refused as a decompression bomb, before it is decoded.

    Attributes:
      pixels: of one frame, as stored and as scaled; frames, seconds: of one video.
    """

    pixels: int = 2**26
    frames: int = 2**21
    seconds: float = 24 * 3600.0


LIMITS = MediaLimits()


def require_file(path) -> None:
    """Raises MediaError unless `path` is a file that can be read and is not empty."""
    if not os.path.exists(path):
        raise MediaError(f"{path}: no such file; check the path")
    if not os.path.isfile(path):
        raise MediaError(f"{path}: not a file; name one image or video")
    if os.path.getsize(path) == 0:
        raise MediaError(f"{path}: empty; copy it again or delete it")
    if not os.access(path, os.R_OK):
        raise MediaError(f"{path}: no permission to read it; fix its permissions")


def file_url(path) -> str:
    """Returns `path` as a URL, so that ffmpeg reads no protocol into a name like `12:30.mp4`."""
    return f"file:{os.fspath(path)}"


@contextmanager
def written_atomically(path) -> Iterator[str]:
    """Yields a temporary name beside `path`; renamed to `path` on success, else removed."""
    path = Path(path)
    if not path.parent.is_dir():
        raise UsageError(f"{path}: its folder does not exist; make it first")
    with replacing(path) as temporary:
        yield str(temporary)


def require_sane_size(path, height: int, width: int, *, limits: MediaLimits) -> None:
    """Raises MediaError, naming `path`, for a frame of more than `limits.pixels` pixels."""
    if height * width > limits.pixels:
        raise MediaError(
            f"{path}: {width}x{height} is more than {limits.pixels} pixels; scale it down or "
            "delete it"
        )


def require_rgb(pixels, *, dims: int) -> np.ndarray:
    """Returns `pixels` as uint8 [..., 3] of `dims` axes; UsageError for another shape or type."""
    pixels = np.asarray(pixels)
    if pixels.dtype != np.uint8 or pixels.ndim != dims or pixels.shape[-1] != 3 or not pixels.size:
        shape = "[H, W, 3]" if dims == 3 else "[T, H, W, 3]"
        raise UsageError(f"expected uint8 {shape}, all above 0, got {pixels.dtype} {pixels.shape}")
    return pixels
