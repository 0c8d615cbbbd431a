"""Which of the recorded frames are read at a lower rate: one rule, for training and all else."""

import numpy as np


def step_between(recorded, fps: float) -> np.ndarray:
    """float64, shape of `recorded`: recorded frames from one that is read to the next, 1 or more.

    Args:
      recorded: frames a second of the recording, 0 for an image.
      fps: frames a second that are asked for; 0 for those of the recording. Where it has fewer,
        it is read as it is: no frame is made up.
    """
    if not fps:
        return np.ones(np.shape(recorded))
    return np.maximum(1.0, np.asarray(recorded) / fps)


def frames_read(frames, step) -> np.ndarray:
    """int64: how many of `frames` are read at every `step`: those at 0, step, 2 step ... before
    the recording ends."""
    return np.ceil(np.asarray(frames) / step).astype(np.int64)


def recorded_at(numbers: np.ndarray, *, step: float, frames: int) -> np.ndarray:
    """int64, ascending: the recorded frames nearest to the times of `numbers`, frames at the lower
    rate; the last of `frames` where there is none so late."""
    return np.minimum(np.floor(numbers * step + 0.5).astype(np.int64), frames - 1)
