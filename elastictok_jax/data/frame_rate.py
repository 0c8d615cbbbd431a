"""Selects the recorded frames to read at a lower frame rate, by one rule for all callers."""

import numpy as np


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
