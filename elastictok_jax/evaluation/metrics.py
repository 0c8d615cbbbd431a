"""Image metrics on uint8 frames."""

import numpy as np

PEAK = 2.0  # of the [-1, 1] pixel scale


def mse(original: np.ndarray, reconstruction: np.ndarray) -> float:
    """Mean squared error of uint8 frames on the [-1, 1] scale."""
    difference = (original.astype(np.float64) - reconstruction) / 127.5
    return float(np.mean(difference**2))


def psnr(error: float) -> float:
    """Peak signal-to-noise ratio in dB of an MSE on the [-1, 1] scale; inf where it is 0."""
    return float("inf") if error <= 0 else 10.0 * float(np.log10(PEAK**2 / error))
