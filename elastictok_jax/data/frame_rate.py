"""Frame rates: which recorded frames are read at a lower rate, and rates that can be written."""

from fractions import Fraction
from pathlib import Path

import numpy as np

SLOWEST, FASTEST = 1e-5, 100_000  # frames a second that can be written


def frame_rate_step(recorded, fps: float) -> np.ndarray:
    """Returns the step between frames to read, in recorded frames: float64 >= 1, as `recorded`.

    Args:
      recorded: frames a second of the recording, 0 for an image.
      fps: requested frames a second, 0 for those of the recording. A slower recording is read at
        its own rate: no frame is synthesized.
    """
    if not fps:
        return np.ones(np.shape(recorded))
    return np.maximum(1.0, np.asarray(recorded) / fps)


def count_frames_at_rate(frames, step) -> np.ndarray:
    """Counts the frames at 0, step, 2 step, ... below `frames`: int64."""
    return np.ceil(np.asarray(frames) / step).astype(np.int64)


def recorded_frames_at_rate(numbers: np.ndarray, *, step: float, frames: int) -> np.ndarray:
    """Returns the recorded frame nearest to each of `numbers`, frames at the lower rate.

    Returns int64, ascending like `numbers`; the last of `frames` for times after the end.
    """
    return np.minimum(np.floor(numbers * step + 0.5).astype(np.int64), frames - 1)


def is_writable_frame_rate(fps: float) -> bool:
    """Returns whether a video of `fps` frames a second can be written."""
    return SLOWEST <= fps <= FASTEST


def frame_rate_fault(path, fps: float) -> str:
    """Returns why a video of `fps` frames a second cannot be written to `path`; "" if it can."""
    if not is_writable_frame_rate(fps):
        return f"{path}: fps is {fps:g}; a video has from {SLOWEST:g} to {FASTEST:,}"
    if Path(path).suffix.lower() == ".mkv" and fps > 1000:
        return f"{path}: fps is {fps:g}; .mkv stores times in milliseconds, so at most 1000"
    return ""


def exact_frame_rate(fps: float) -> Fraction:
    """Returns the fraction that is meant: 23.976 is 24000 / 1001, 0.00027778 one an hour."""
    if fps >= 1:
        return Fraction(fps).limit_denominator(1001)
    return 1 / Fraction(1 / fps).limit_denominator(1001)
