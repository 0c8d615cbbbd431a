"""Pixels: uint8 to floats in [-1, 1] and back, and the error between two pictures."""

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
PEAK = 2.0  # of the [-1, 1] scale


def pixels_to_float(pixels_uint8: Array) -> Array:
    """Converts uint8 [0, 255] to float32 [-1, 1]: x / 127.5 - 1."""
    return pixels_uint8.astype(jnp.float32) / 127.5 - 1.0


def pixels_to_uint8(pixels: Array) -> Array:
    """Converts floats in [-1, 1] to uint8, clipped and rounded to nearest."""
    return jnp.round((jnp.clip(pixels, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)


def pixel_mse(original: np.ndarray, decoded: np.ndarray) -> float:
    """Returns the mean squared error of uint8 frames on the [-1, 1] scale."""
    difference = (original.astype(np.float64) - decoded) / 127.5
    return float(np.mean(difference**2))


def pixel_psnr(error: float) -> float:
    """Returns the PSNR in dB of an MSE on the [-1, 1] scale; inf where it is 0."""
    return float("inf") if error <= 0 else 10.0 * float(np.log10(PEAK**2 / error))
