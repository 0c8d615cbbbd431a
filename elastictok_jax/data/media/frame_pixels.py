"""Converts decoded video frames to upright RGB pixels."""

from typing import Any

import av
import numpy as np
from av.sidedata.sidedata import Type as SideDataType
from av.video.reformatter import ColorRange

from elastictok_jax.data.media import color
from elastictok_jax.data.media.files import MediaError


class ToRgb:
    """Converts frames to RGB and applies their rotation. Not thread-safe."""

    def __init__(self, siting: str = "") -> None:
        self._planes = color.ToRgbPlanes(siting)

    def __call__(self, frame: av.VideoFrame, out_HWC: np.ndarray, *, path) -> None:
        """Writes uint8 [H, W, 3] into `out_HWC`; MediaError if the frame has another size."""
        matrix = display_matrix(frame)
        for channel, plane in enumerate(self._planes(frame)):
            shown = _upright(plane, matrix)
            if shown.shape != out_HWC.shape[:2]:
                height, width = out_HWC.shape[:2]
                raise MediaError(
                    f"{path}: the frame size changes from {width}x{height} to "
                    f"{shown.shape[1]}x{shown.shape[0]}; re-encode it at one size"
                )
            out_HWC[..., channel] = shown


def yuv_to_rgb(
    data: bytes, *, pixel_format: str, height: int, width: int, full_range: bool, siting: str
) -> np.ndarray:
    """Converts a planar frame's bytes to uint8 [H, W, 3].

    `pixel_format` is yuv420p, yuv422p, yuv444p or gray, 8 bits a sample; `siting` is as in
    `color`. The matrix is BT.709 from 720 lines on, else BT.601, as for files that name none.
    """
    frame = av.VideoFrame(width, height, pixel_format)
    if full_range:
        frame.color_range = ColorRange.JPEG
    at = 0
    for plane in frame.planes:
        lines = np.zeros((plane.buffer_size // plane.line_size, plane.line_size), np.uint8)
        size = plane.height * plane.width
        samples = np.frombuffer(data, np.uint8, count=size, offset=at)
        lines[: plane.height, : plane.width] = samples.reshape(plane.height, plane.width)
        plane.update(lines.tobytes())
        at += size
    out = np.empty((height, width, 3), np.uint8)
    ToRgb(siting)(frame, out, path="a frame")
    return out


def display_matrix(frame: av.VideoFrame) -> tuple[int, int, int, int]:
    """Returns (a, b, c, d): the stored pixel (x, y) is shown at (a x + c y, b x + d y).

    x points right and y down (ISO/IEC 14496-12, 8.3.2). Only ratios and signs matter here.
    """
    entries: Any = frame.side_data  # a mapping by type, whatever the stubs say
    if SideDataType.DISPLAYMATRIX not in entries:
        return 1, 0, 0, 1
    matrix = bytes(entries[SideDataType.DISPLAYMATRIX])[:36]
    a, b, _, c, d, *_ = np.frombuffer(matrix, np.int32).tolist()
    return a, b, c, d


def _upright(plane_HW: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """Rotates and mirrors a plane by its display matrix, to the nearest quarter turn."""
    a, b, c, d = matrix
    if is_transposed(matrix):
        plane_HW, a, d = plane_HW.T, c, b
    return plane_HW[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def is_transposed(matrix: tuple[int, int, int, int]) -> bool:
    """Returns whether a display matrix swaps height and width."""
    a, b, _, _ = matrix
    return abs(b) > abs(a)
