"""Reads frames from a pipe: raw rgb24, or YUV4MPEG2 (y4m), whose header gives its format.

Dimension key: H height, W width. One frame is held at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from elastictok_jax.data.media.color import usual_chroma_siting, yuv_to_rgb
from elastictok_jax.data.media.files import LIMITS
from elastictok_jax.errors import UsageError

Y4M = b"YUV4MPEG2"
_LINE = 1024  # most bytes of a y4m header line
# Pixel format and chroma siting ("" for the usual one) by the name of a layout.
_LAYOUTS = {
    "420": ("yuv420p", "center"),
    "420jpeg": ("yuv420p", "center"),
    "420mpeg2": ("yuv420p", "left"),
    "420paldv": ("yuv420p", "topleft"),
    "422": ("yuv422p", ""),
    "444": ("yuv444p", ""),
    "mono": ("gray", ""),
}
_OLD_LAYOUT = b"XYSCSS="  # names the layout in old streams, which have no C


class CutOff(Exception):
    """The stream ends within a frame or continues with garbage; all frames before are sound."""


@dataclass(frozen=True)
class Y4mHeader:
    """Header of a y4m stream; fps is 0 if unknown, siting is the chroma siting as in `color`."""

    height: int
    width: int
    fps: float
    pixel_format: str
    full_range: bool
    siting: str

    @property
    def frame_bytes(self) -> int:
        """Bytes of one frame, without its FRAME line."""
        luma = self.height * self.width
        down, across = -(-self.height // 2), -(-self.width // 2)
        chroma = {"yuv420p": down * across, "yuv422p": self.height * across, "yuv444p": luma}
        return luma + 2 * chroma.get(self.pixel_format, 0)


def read_raw(stream: BinaryIO, *, height: int, width: int) -> Iterator[np.ndarray]:
    """Yields frames uint8 [H, W, 3] of raw rgb24 until the stream ends.

    Raises:
      UsageError: if the stream is y4m; CutOff: if it ends within a frame.
    """
    require_raw_size(height, width)
    number = 0
    while data := _frame_data(stream, height * width * 3, number=number):
        if number == 0 and data.startswith(Y4M):
            raise UsageError("standard input is y4m, which gives its own size: leave out --size")
        yield np.frombuffer(data, np.uint8).reshape(height, width, 3)
        number += 1


def read_y4m_header(stream: BinaryIO) -> Y4mHeader:
    """Reads the header line of a y4m stream.

    Raises:
      UsageError: if it is no y4m header, or of a layout that cannot be read here.
    """
    line = stream.readline(_LINE)
    magic, *words = line.split()[:64] or [b""]
    if magic != Y4M:
        raise UsageError(
            "standard input is not y4m: of raw rgb24 frames give --size WIDTHxHEIGHT and --fps"
        )
    fields = {word[:1]: word[1:].decode("ascii", "replace") for word in words if word[:1] != b"X"}
    try:
        height, width = int(fields[b"H"]), int(fields[b"W"])
        over, under = map(int, fields.get(b"F", "0:0").split(":"))
        rate = over / under if over > 0 and under > 0 else 0.0
    except (KeyError, ValueError, OverflowError):
        raise UsageError(
            f"standard input: damaged y4m header {line[:80]!r}: send it again"
        ) from None
    require_raw_size(height, width)
    old = [word.removeprefix(_OLD_LAYOUT) for word in words if word.startswith(_OLD_LAYOUT)]
    colors = fields.get(b"C") or b"".join(old[:1]).decode("ascii", "replace").lower() or "420"
    if colors not in _LAYOUTS:
        known = ", ".join(f"C{name}" for name in _LAYOUTS)
        raise UsageError(f"standard input: y4m of C{colors[:20]}: send one of {known}")
    pixel_format, siting = _LAYOUTS[colors]
    full_range = b"XCOLORRANGE=FULL" in words
    return Y4mHeader(
        height=height,
        width=width,
        fps=rate,
        pixel_format=pixel_format,
        full_range=full_range,
        siting=siting or usual_chroma_siting(full_range=full_range),
    )


def read_y4m(stream: BinaryIO, header: Y4mHeader) -> Iterator[np.ndarray]:
    """Yields frames uint8 [H, W, 3] after the header until the stream ends.

    Raises:
      CutOff: if it ends within a frame or continues with garbage.
    """
    number = 0
    while line := stream.readline(_LINE):
        if not (line.startswith(b"FRAME") and line.endswith(b"\n")):
            raise CutOff(f"within frame {number}: {line[:20]!r} where FRAME should be")
        data = _frame_data(stream, header.frame_bytes, number=number)
        if not data:
            raise CutOff(f"within frame {number}")
        yield yuv_to_rgb(
            data,
            pixel_format=header.pixel_format,
            height=header.height,
            width=header.width,
            full_range=header.full_range,
            siting=header.siting,
        )
        number += 1


def require_raw_size(height: int, width: int) -> None:
    """Raises UsageError for a size that no frame has."""
    if height < 1 or width < 1 or height * width > LIMITS.pixels:
        raise UsageError(
            f"frames of {width}x{height}: give 1 to {LIMITS.pixels} pixels, as WIDTHxHEIGHT"
        )


def _frame_data(stream: BinaryIO, size: int, *, number: int) -> bytes:
    """Reads the bytes of a frame, b"" at the end of the stream."""
    data = stream.read(size)
    if 0 < len(data) < size:
        raise CutOff(f"within frame {number}: {len(data)} of {size} bytes")
    return data
