"""Generates clips of drifting waves and a moving square: data without files, for trials."""

import hashlib

import numpy as np

ITEMS = 256
IMAGE_SHARE = 0.25
LONGEST = 1024  # frames
FPS = 24.0
ASPECT = 4 / 3
WAVES = 3


class SyntheticSource:
    """Generates 256 items, each a function of its number; see `base.Source`.

    A quarter are images, the rest videos of 8 to 1024 frames (log-uniform) of various speeds.
    """

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.is_video = rng.random(ITEMS) >= IMAGE_SHARE
        lengths = np.exp(rng.uniform(np.log(8), np.log(LONGEST), ITEMS)).astype(np.int64)
        self.frames = np.where(self.is_video, lengths, 1)
        self.fps = np.where(self.is_video, FPS, 0.0)
        digests = [hashlib.sha256(self.name(item).encode()).digest() for item in range(ITEMS)]
        self.place = np.array([int.from_bytes(d[:8], "big") for d in digests], np.uint64)
        self.fingerprint = hashlib.sha256(self.frames.tobytes()).hexdigest()[:16]

    def name(self, item: int) -> str:
        return f"synthetic/{item}"

    def read(self, item: int, indices: np.ndarray, *, side: int) -> np.ndarray:
        rng = np.random.default_rng([1, item])
        speed = rng.exponential(0.05)
        color_WC = rng.uniform(-40, 40, (WAVES, 3))
        frequency_W2 = rng.normal(0, 8, (WAVES, 2))
        phase_W, drift_W = rng.uniform(0, 6, WAVES), rng.normal(0, 4, WAVES) * speed
        corner_2, step_2 = rng.uniform(0, 0.7, 2), rng.normal(0, speed, 2)
        square_C = rng.uniform(0, 255, 3)
        width = round(ASPECT * side)
        y_H1, x_1W = np.arange(side)[:, None] / side, np.arange(width)[None] / side
        out = np.empty((len(indices), side, width, 3), np.uint8)
        for frame, index in zip(out, indices, strict=True):
            waves_HWK = np.stack(
                [
                    np.sin(fy * y_H1 + fx * x_1W + phase + drift * index)
                    for (fy, fx), phase, drift in zip(frequency_W2, phase_W, drift_W, strict=True)
                ],
                axis=-1,
            )
            pixels = 128 + waves_HWK @ color_WC
            top, left = np.abs((corner_2 + step_2 * index) % 1.4 - 0.7)  # bounces off the edges
            inside = (y_H1 >= top) & (y_H1 < top + 0.3) & (x_1W >= left) & (x_1W < left + 0.3)
            frame[:] = np.where(inside[..., None], square_C, pixels).clip(0, 255)
        return out
