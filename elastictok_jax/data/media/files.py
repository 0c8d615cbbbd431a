"""Defines the error and the limits of media files, and checks that one can be read."""

import os
from dataclasses import dataclass

from elastictok_jax.errors import UsageError


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


def require_media_file(path) -> None:
    """Raises MediaError unless `path` is a file that can be read and is not empty."""
    if not os.path.exists(path):
        raise MediaError(f"{path}: no such file; check the path")
    if not os.path.isfile(path):
        raise MediaError(f"{path}: not a file; name one image or video")
    if os.path.getsize(path) == 0:
        raise MediaError(f"{path}: empty; copy it again or delete it")
    if not os.access(path, os.R_OK):
        raise MediaError(f"{path}: no permission to read it; fix its permissions")


def require_parent_folder(path) -> None:
    """Raises UsageError unless the folder that `path` is to be written in exists."""
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise UsageError(f"{path}: its folder does not exist; make it first")
