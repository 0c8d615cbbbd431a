"""Checks, resizes, crops and rotates frames uint8 [T, H, W, 3]."""

from typing import Any

import av
import numpy as np
from av.sidedata.sidedata import Type as SideDataType
from PIL import Image

from elastictok_jax.data.media.files import LIMITS, MediaError, MediaLimits
from elastictok_jax.errors import UsageError

LONGEST = 16  # times the short side: of a longer strip, only the middle is scaled up


def resize_shortest(frames_THWC, *, side: int, name="frames") -> np.ndarray:
    """Resizes frames uint8 [T, H, W, 3] so that the shorter of H and W is `side` pixels.

    Resampling is antialiased (Lanczos) and keeps the aspect to the nearest pixel; frames of that
    size are returned as they are. Raises UsageError for another shape or type, for side < 1 and,
    naming them `name`, if they would exceed LIMITS.
    """
    frames_THWC = require_rgb_frames(frames_THWC, dims=4)
    if side < 1:
        raise UsageError(f"side is {side}; it must be at least 1 pixel")
    count, height, width, _ = frames_THWC.shape
    new_height, new_width = scaled_size(height, width, side=side, name=name)
    if (new_height, new_width) == (height, width):
        return frames_THWC
    resized = np.empty((count, new_height, new_width, 3), np.uint8)
    for frame, out in zip(frames_THWC, resized, strict=True):
        out[:] = resize(frame, height=new_height, width=new_width)
    return resized


def scaled_size(height: int, width: int, *, side: int, name="frames") -> tuple[int, int]:
    """Returns height and width in pixels after `resize_shortest`.

    Raises MediaError, naming it `name`, if that exceeds LIMITS.
    """
    short = min(height, width)
    if short == side:
        return height, width
    high, wide = max(side, round(height * side / short)), max(side, round(width * side / short))
    if side > short and high * wide > LIMITS.pixels:
        raise MediaError(
            f"{name}: {width}x{height} scaled to {side} pixels on its shortest side is "
            f"{wide}x{high}, more than {LIMITS.pixels} pixels; choose a smaller resolution or crop "
            "it"
        )
    return high, wide


def crop_long_strip(frames_THWC, *, longest: int = LONGEST) -> np.ndarray:
    """Crops frames uint8 [T, H, W, 3] so that no side is more than `longest` times the other.

    Returns a view. Scaling it up has a bounded cost.
    """
    height, width = cropped_strip_size(*frames_THWC.shape[1:3], longest=longest)
    return center_crop(frames_THWC, height=height, width=width)


def cropped_strip_size(height: int, width: int, *, longest: int) -> tuple[int, int]:
    """Returns height and width after `crop_long_strip`."""
    return min(height, longest * width), min(width, longest * height)


def resize(frame_HWC: np.ndarray, *, height: int, width: int) -> np.ndarray:
    """Resizes one frame uint8 [H, W, 3] with antialiasing (Lanczos)."""
    if frame_HWC.shape[:2] == (height, width):
        return frame_HWC
    resized = Image.fromarray(np.ascontiguousarray(frame_HWC))
    return np.asarray(resized.resize((width, height), Image.Resampling.LANCZOS))


def center_crop(frames_THWC, *, height: int, width: int) -> np.ndarray:
    """Crops frames uint8 [T, H, W, 3] to their center [T, height, width, 3], a view.

    Raises UsageError if the frames are smaller than that.
    """
    frames_THWC = require_rgb_frames(frames_THWC, dims=4)
    _, old_height, old_width, _ = frames_THWC.shape
    if not (0 < height <= old_height and 0 < width <= old_width):
        raise UsageError(
            f"cannot crop {height}x{width} out of {old_height}x{old_width}; resize first"
        )
    top, left = (old_height - height) // 2, (old_width - width) // 2
    return frames_THWC[:, top : top + height, left : left + width]


def require_sane_size(path, height: int, width: int, *, limits: MediaLimits) -> None:
    """Raises MediaError, naming `path`, for a frame of more than `limits.pixels` pixels."""
    if height * width > limits.pixels:
        raise MediaError(
            f"{path}: {width}x{height} is more than {limits.pixels} pixels; scale it down or "
            "delete it"
        )


def require_rgb_frames(pixels, *, dims: int) -> np.ndarray:
    """Returns `pixels` as uint8 [..., 3] of `dims` axes; UsageError for another shape or type."""
    pixels = np.asarray(pixels)
    if pixels.dtype != np.uint8 or pixels.ndim != dims or pixels.shape[-1] != 3 or not pixels.size:
        shape = "[H, W, 3]" if dims == 3 else "[T, H, W, 3]"
        raise UsageError(f"expected uint8 {shape}, all above 0, got {pixels.dtype} {pixels.shape}")
    return pixels


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


def is_transposed(matrix: tuple[int, int, int, int]) -> bool:
    """Returns whether a display matrix swaps height and width."""
    a, b, _, _ = matrix
    return abs(b) > abs(a)


def upright(plane_HW: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """Rotates and mirrors a plane by its display matrix, to the nearest quarter turn."""
    a, b, c, d = matrix
    if is_transposed(matrix):
        plane_HW, a, d = plane_HW.T, c, b
    return plane_HW[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def require_clip_or_image(video: np.ndarray) -> np.ndarray:
    """Returns uint8 [T, H, W, 3] of a clip or of an image [H, W, 3].

    Raises:
      UsageError: if it is neither.
    """
    if video.ndim == 3:
        video = video[None]
    if video.ndim != 4 or video.shape[-1] != 3 or 0 in video.shape or video.dtype != np.uint8:
        raise UsageError(
            f"a clip must be uint8 [T, H, W, 3] (or an image [H, W, 3]) with no empty axis; "
            f"this is {video.dtype} {list(video.shape)}"
        )
    return video
