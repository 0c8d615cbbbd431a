"""Per-frame quality metrics: MSE, PSNR, SSIM, MS-SSIM.

They take a batch of frames, work under `jax.jit` and with the batch axis sharded over
devices, and return one value per frame. Pixels are those of the project: uint8, or floats in
[-1, 1] (x / 127.5 - 1), whose data range is 2.

Shape suffixes: B frames, H and W pixels, C = 3 colours.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from elastictok_jax.errors import UsageError
from elastictok_jax.pixels import PEAK, pixels_to_float

_RADIUS = 5  # of the SSIM window, which is 11 pixels wide
_SIGMA = 1.5
MIN_SIDE = 2 * _RADIUS + 1
# Wang et al. 2003, section 3.2: exponents of the scales from the finest to the coarsest.
_SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
MIN_SIDE_MULTISCALE = MIN_SIDE * 2 ** (len(_SCALE_WEIGHTS) - 1)


def frame_mse(x: ArrayLike, y: ArrayLike) -> jax.Array:
    """Computes the mean squared error of each frame on the [-1, 1] scale, float32 [B].

    `x` and `y` are [B, H, W, 3], each uint8 or floats in [-1, 1]. Raises UsageError for others.
    """
    x_BHWC, y_BHWC = _frames(x, y, min_side=1)
    return jnp.mean(jnp.square(x_BHWC - y_BHWC), axis=(1, 2, 3))


def frame_psnr(x: ArrayLike, y: ArrayLike) -> jax.Array:
    """Computes the peak signal-to-noise ratio of each frame in dB, float32 [B]; inf if equal.

    `x` and `y` are as in `frame_mse`. The mean PSNR is not the PSNR of the mean error.
    """
    return 10.0 * jnp.log10(PEAK**2 / frame_mse(x, y))


def ssim(x: ArrayLike, y: ArrayLike) -> jax.Array:
    """Computes the structural similarity of each frame, float32 [B]; 1 for equal frames.

    Source: Wang et al. 2004, "Image Quality Assessment: From Error Visibility to Structural
    Similarity", section III: Gaussian windows of 11x11 pixels and deviation 1.5, K1 = 0.01,
    K2 = 0.03, weighted (not sample) variances. It is computed for each colour and averaged over
    colours and the windows inside the frame, as in the authors' code and scikit-image;
    torchmetrics 1.9 also counts windows over a reflected border.

    `x` and `y` are [B, H, W, 3], each uint8 or floats in [-1, 1], of 11 pixels a side or more.
    Raises UsageError for others.
    """
    x_BHWC, y_BHWC = _frames(x, y, min_side=MIN_SIDE)
    luminance, contrast = _similarities(x_BHWC, y_BHWC)
    return jnp.mean(luminance * contrast, axis=(1, 2, 3))


def ms_ssim(x: ArrayLike, y: ArrayLike) -> jax.Array:
    """Computes the multi-scale structural similarity of each frame, float32 [B]; 1 if equal.

    Source: Wang, Simoncelli and Bovik 2003, "Multi-Scale Structural Similarity for Image Quality
    Assessment", section 3: five scales, each half as wide as the one before (means of 2x2 pixels;
    an odd last row or column is dropped), with the windows of `ssim`. The contrast terms of all
    scales but the coarsest, and the full similarity of the coarsest, are averaged over the frame
    and its colours, clipped at 0, raised to the scale's weight, and multiplied.

    Choices left open by the paper follow torchmetrics 1.9: the coarsest scale has a reflected
    border, since few windows fit inside it; the others use only windows inside the frame.

    `x` and `y` are [B, H, W, 3], each uint8 or floats in [-1, 1], of 176 pixels a side or more.
    Raises UsageError for others.
    """
    x_BHWC, y_BHWC = _frames(x, y, min_side=MIN_SIDE_MULTISCALE)
    result_B = jnp.ones(x_BHWC.shape[0], jnp.float32)
    *finer, coarsest = _SCALE_WEIGHTS
    for weight in finer:
        _, contrast = _similarities(x_BHWC, y_BHWC)
        result_B *= _positive_power(jnp.mean(contrast, axis=(1, 2, 3)), weight)
        x_BHWC, y_BHWC = _halve(x_BHWC), _halve(y_BHWC)
    luminance, contrast = _similarities(_reflect(x_BHWC), _reflect(y_BHWC))
    return result_B * _positive_power(jnp.mean(luminance * contrast, axis=(1, 2, 3)), coarsest)


def _frames(x: ArrayLike, y: ArrayLike, *, min_side: int) -> tuple[jax.Array, jax.Array]:
    """Checks both batches and converts them to float32 frames in [-1, 1]."""
    x_BHWC, y_BHWC = jnp.asarray(x), jnp.asarray(y)
    if x_BHWC.shape != y_BHWC.shape:
        raise UsageError(f"frames of {x_BHWC.shape} and {y_BHWC.shape} cannot be compared")
    if x_BHWC.ndim != 4 or x_BHWC.shape[-1] != 3:
        raise UsageError(f"frames are [B, H, W, 3], not {x_BHWC.shape}")
    if min(x_BHWC.shape[1:3]) < min_side:
        height, width = x_BHWC.shape[1:3]
        raise UsageError(
            f"frames of {height}x{width} are too small: give at least {min_side} a side"
        )
    return _to_float(x_BHWC), _to_float(y_BHWC)


def _to_float(x_BHWC: jax.Array) -> jax.Array:
    if x_BHWC.dtype == jnp.uint8:
        return pixels_to_float(x_BHWC)
    if not jnp.issubdtype(x_BHWC.dtype, jnp.floating):
        raise UsageError(f"frames are uint8 or floats in [-1, 1], not {x_BHWC.dtype}")
    return x_BHWC.astype(jnp.float32)


def _similarities(x_BHWC: jax.Array, y_BHWC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes SSIM's luminance and contrast-structure terms in each window inside the frame.

    Both are written as 1 minus a loss, in terms of the sum and difference of the frames, so that
    they are accurate for nearly equal frames, however flat, dark or bright.
    """
    total, difference = x_BHWC + y_BHWC, x_BHWC - y_BHWC
    # One blur of all moments instead of four compiles to a quarter of the program.
    moments = (total, difference, jnp.square(total), jnp.square(difference))
    blurred = jnp.split(_blur(jnp.concatenate(moments, axis=-1)), len(moments), axis=-1)
    mean_t, mean_d, square_t, square_d = blurred
    variance_t = jnp.maximum(square_t - mean_t**2, 0.0)
    variance_d = jnp.maximum(square_d - mean_d**2, 0.0)
    light_t = mean_t + 2.0  # the luminance term is relative to black, which is -1 in each frame
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    luminance = 1.0 - mean_d**2 / ((light_t**2 + mean_d**2) / 2 + c1)
    contrast = 1.0 - variance_d / ((variance_t + variance_d) / 2 + c2)
    return luminance, contrast


def _blur(x_BHWC: jax.Array) -> jax.Array:
    """Returns the Gaussian means of the windows inside the frame, [B, H - 10, W - 10, C].

    It sums shifted slices instead of a convolution, which stays float32 on every backend.
    """
    window = np.exp(-(np.arange(-_RADIUS, _RADIUS + 1) ** 2) / (2 * _SIGMA**2))
    window = (window / window.sum()).astype(np.float32)
    height, width = (side - 2 * _RADIUS for side in x_BHWC.shape[1:3])
    rows = sum(weight * x_BHWC[:, i : i + height] for i, weight in enumerate(window))
    return sum(weight * rows[:, :, i : i + width] for i, weight in enumerate(window))


def _halve(x_BHWC: jax.Array) -> jax.Array:
    batch, height, width, channels = x_BHWC.shape
    even = x_BHWC[:, : height // 2 * 2, : width // 2 * 2]
    pairs = even.reshape(batch, height // 2, 2, width // 2, 2, channels)
    return jnp.mean(pairs, axis=(2, 4))


def _reflect(x_BHWC: jax.Array) -> jax.Array:
    border = (_RADIUS, _RADIUS)
    return jnp.pad(x_BHWC, ((0, 0), border, border, (0, 0)), mode="reflect")


def _positive_power(mean_B: jax.Array, weight: float) -> jax.Array:
    """Returns max(mean, 0) ** weight, with a finite gradient at and below 0."""
    positive = mean_B > 0
    return jnp.where(positive, jnp.where(positive, mean_B, 1.0) ** weight, 0.0)
