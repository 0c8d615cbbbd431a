"""Images and videos as uint8 RGB arrays, and back.

Dimensions: T frames, H height, W width, C = 3 (red, green, blue). This is the only file that
imports av. Reading frames at random gives exactly what reading the file in order gives: frames
are found by presentation timestamp, never by frame rate, and every frame that a seek returns is
checked against the timestamps of the whole file.
"""

import os
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image, ImageOps

from elastictok_jax.errors import UsageError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
VIDEO_SUFFIXES = frozenset(
    {".gif", ".mp4", ".mkv", ".mov", ".webm", ".avi", ".mpg", ".mpeg", ".m4v"}
)
MAX_PIXELS = 2**26  # 8192 x 8192: a larger picture is taken for a decompression bomb
_MOV_FAMILY = frozenset({"mov", "mp4", "m4v", "m4a", "3gp", "3g2", "mj2"})
_STATED_DURATION = frozenset({"matroska", "webm"})  # containers whose header states the duration
_AV_COLORSPACE_UNKNOWN = 2
_MAX_STEPS_BACK = 8  # keyframes to step back before decoding from the start

type_error_hint = "expected uint8 with shape"


class MediaError(UsageError):
    """A media file is missing, damaged or unsuitable; names the file, the fault and the mend."""


@dataclass(frozen=True)
class MediaInfo:
    """What a media file holds; fps is frames per second (0 for an image), sizes are in pixels."""

    path: str
    kind: str
    frames: int
    fps: float
    height: int
    width: int


@dataclass(frozen=True)
class _VideoIndex:
    """Where the frames of a video are.

    pts holds the timestamps in presentation order (in stream time-base units), keyframes those
    at which decoding may start. seekable is False where they cannot be trusted, and then frames
    are only ever counted off from the start.
    """

    frame_count: int
    pts: tuple[int, ...]
    keyframes: tuple[int, ...]
    seekable: bool
    fps: float
    height: int
    width: int


def media_kind(path) -> str:
    """'image' or 'video' by the suffix of `path`; MediaError for any other suffix."""
    suffix = Path(path).suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return "image"
    if suffix in VIDEO_SUFFIXES:
        return "video"
    known = " ".join(sorted(IMAGE_SUFFIXES | VIDEO_SUFFIXES))
    raise MediaError(f"{path}: unknown suffix {suffix!r}; use one of {known}")


def probe(path) -> MediaInfo:
    """Checks the file at `path` without decoding it whole and says what it holds.

    A video is demuxed, its length on disk is compared with what its index asks for, and its
    first and last frames are decoded. Raises MediaError for a file that is missing, empty, not
    media, truncated or without frames.
    """
    if media_kind(path) == "image":
        height, width, _ = read_image(path).shape
        return MediaInfo(str(path), "image", 1, 0.0, height, width)
    with VideoReader(path) as reader:
        reader.read(0, 1)
        reader.read(reader.frame_count - 1, 1)
        return MediaInfo(
            str(path), "video", reader.frame_count, reader.fps, reader.height, reader.width
        )


def read_frames(path, *, start: int = 0, count: int | None = None) -> np.ndarray:
    """Frames [start, start + count) of a video, or an image as one frame: uint8 [T, H, W, 3].

    `count` None reads to the end. Raises MediaError as `probe`, and for frames that are not there.
    """
    if media_kind(path) == "image":
        if start != 0 or count not in (None, 1):
            raise MediaError(f"{path}: an image has one frame; ask for start=0, count=1")
        return read_image(path)[None]
    with VideoReader(path) as reader:
        return reader.read(start, reader.frame_count - start if count is None else count)


def read_image(path) -> np.ndarray:
    """The picture at `path` as uint8 [H, W, 3].

    Turned as its EXIF orientation says, grey and palette widened to RGB, 16 bits reduced to 8,
    transparency laid over white; of an animation, the first frame. Raises MediaError for a file
    that is missing, empty, no image, truncated, or of more than MAX_PIXELS pixels.
    """
    _require_file(path)
    too_large = f"{path}: more than {MAX_PIXELS} pixels; scale it down first"
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise MediaError(too_large)
            # The bytes are asked for only once the size is known to be sane.
            return np.asarray(_to_rgb(ImageOps.exif_transpose(image)))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise MediaError(too_large) from error
    except MediaError:
        raise
    except Image.UnidentifiedImageError as error:
        raise MediaError(f"{path}: not an image, whatever its suffix; delete it") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise MediaError(
            f"{path}: damaged image ({error}); save it again or delete it"
        ) from error
