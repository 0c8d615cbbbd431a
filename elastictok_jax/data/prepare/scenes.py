"""Detects scene cuts: frames that differ from the one before far more than the last ones did."""

import numpy as np
from PIL import Image

THUMBNAIL = (32, 18)
LEAST_CHANGE = 18.0  # mean absolute difference of pixels, of 255
LEAST_RATIO = 4.0  # to the mean of the last changes
MEMORY = 8  # changes in that mean
SHORTEST = 8  # frames of a stretch


class SceneCuts:
    """Detects scene cuts in frames given in order."""

    def __init__(self) -> None:
        self._before: np.ndarray | None = None
        self._changes: list[float] = []
        self._length = 0

    def is_cut(self, frame_HWC: np.ndarray) -> bool:
        """Returns whether uint8 [H, W, 3] starts a new scene after the frame given before it."""
        small = Image.fromarray(frame_HWC).resize(THUMBNAIL, Image.Resampling.BOX)
        pixels = np.asarray(small, np.float32)
        before, self._before = self._before, pixels
        self._length += 1
        if before is None:
            return False
        change = float(np.abs(pixels - before).mean())
        usual = float(np.mean(self._changes)) if self._changes else 0.0
        cut = change > LEAST_CHANGE and change > LEAST_RATIO * usual and self._length > SHORTEST
        self._changes = [] if cut else [*self._changes[-MEMORY + 1 :], change]
        self._length = 1 if cut else self._length
        return cut


def scene_cuts(frames_THWC: np.ndarray) -> np.ndarray:
    """Returns int64 [C], the first frames of scenes after the first."""
    cuts = SceneCuts()
    return np.asarray([t for t, frame in enumerate(frames_THWC) if cuts.is_cut(frame)], np.int64)
