"""Figures of frames and codes: how far a reconstruction is, and how well a codebook is used.

`mse` and `psnr` are numpy, of a whole clip. The others take a batch of frames, work under `jax.jit`
and with the batch axis over devices, and give one figure a frame. Pixels are those of the
project: uint8, or floats in [-1, 1] (x / 127.5 - 1), whose data range is 2.

Shape suffixes: B frames, H and W pixels, C = 3 colours.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from elastictok_jax.errors import UsageError
from elastictok_jax.layers import bottlenecks

PEAK = 2.0  # of the [-1, 1] pixel scale

_RADIUS = 5  # of the window of SSIM, 11 pixels wide
_SIGMA = 1.5
MIN_SIDE = 2 * _RADIUS + 1
# Wang et al. 2003, section 3.2: exponents of the scales from the finest to the coarsest.
_SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
MIN_SIDE_MULTISCALE = MIN_SIDE * 2 ** (len(_SCALE_WEIGHTS) - 1)


def mse(original: np.ndarray, reconstruction: np.ndarray) -> float:
    """Mean squared error of uint8 frames on the [-1, 1] scale."""
    difference = (original.astype(np.float64) - reconstruction) / 127.5
    return float(np.mean(difference**2))


def psnr(error: float) -> float:
    """Peak signal-to-noise ratio in dB of an MSE on the [-1, 1] scale; inf where it is 0."""
    return float("inf") if error <= 0 else 10.0 * float(np.log10(PEAK**2 / error))


def frame_mse(x: ArrayLike, y: ArrayLike) -> jax.Array:
    """Mean squared error of each frame on the [-1, 1] scale: float32 [B].

    `x` and `y` are [B, H, W, 3], each uint8 or floats in [-1, 1]. Raises UsageError for others.
    """
    x_BHWC, y_BHWC = _frames(x, y, min_side=1)
    return jnp.mean(jnp.square(x_BHWC - y_BHWC), axis=(1, 2, 3))


def frame_psnr(x: ArrayLike, y: ArrayLike) -> jax.Array:
    """Peak signal-to-noise ratio of each frame in dB: float32 [B]; inf for equal frames.

    `x` and `y` are as in `frame_mse`. The mean of these is not the PSNR of the mean error.
    """
    return 10.0 * jnp.log10(PEAK**2 / frame_mse(x, y))


def ssim(x: ArrayLike, y: ArrayLike) -> jax.Array:
    """Structural similarity of each frame: float32 [B], 1 for equal frames.

    Source: Wang et al. 2004, "Image Quality Assessment: From Error Visibility to Structural
    Similarity", section III: Gaussian windows of 11x11 pixels and deviation 1.5, K1 = 0.01,
    K2 = 0.03, weighted (not sample) variances. It is computed for each colour, and the mean is
    over colours and those windows that lie within the frame: as by the paper's authors and by
    scikit-image, while torchmetrics 1.9 also counts windows over a reflected border.

    `x` and `y` are [B, H, W, 3], each uint8 or floats in [-1, 1], of 11 pixels a side or more.
    Raises UsageError for others.
    """
    x_BHWC, y_BHWC = _frames(x, y, min_side=MIN_SIDE)
    luminance, contrast = _similarities(x_BHWC, y_BHWC)
    return jnp.mean(luminance * contrast, axis=(1, 2, 3))


def ms_ssim(x: ArrayLike, y: ArrayLike) -> jax.Array:
    """Multi-scale structural similarity of each frame: float32 [B], 1 for equal frames.

    Source: Wang, Simoncelli and Bovik 2003, "Multi-Scale Structural Similarity for Image Quality
    Assessment", section 3: five scales, each half as wide as the one before (means of 2x2 pixels;
    a last odd row or column is left out), with the windows of `ssim`. The contrast terms of all
    scales but the coarsest, and the whole similarity of that one, are averaged over the frame and
    its colours, negative means set to 0, raised to the scale's weight, and multiplied.

    Where the paper leaves a choice, it is that of torchmetrics 1.9: the border of the coarsest
    scale is reflected, since few windows lie within it; at the others, windows lie within.

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


def codebook_statistics(
    codes: np.ndarray | jax.Array | Iterable[np.ndarray | jax.Array], *, size: int
) -> dict[str, float]:
    """How a codebook of `size` codes is used, exactly, from the counts of `codes`.

    `codes` are integers in [0, size): one array of any shape, or several (such as
    `Tokens.codes`, or a generator of those of many clips, one at a time). Gives

    - `tokens`: how many codes there are, and `codes_used`: how many different ones;
    - `codebook_usage`: `codes_used` / `size`. With few tokens it is bounded by their number;
    - `code_entropy_bits`: Shannon entropy of their frequencies, in bits a token;
    - `codebook_perplexity`: 2 to that power; `size` if all codes are as frequent.

    Raises UsageError if there are none, or for what are not such integers.
    """
    counts = np.zeros(size, np.int64)
    for array in [codes] if isinstance(codes, np.ndarray | jax.Array) else codes:
        counts += _count(np.asarray(array), size=size)
    tokens = int(counts.sum())
    if not tokens:
        raise UsageError("there are no codes to count")
    use = bottlenecks.codebook_statistics(counts)
    return {
        "tokens": tokens,
        "codes_used": int(np.count_nonzero(counts)),
        "codebook_usage": use["usage"],
        "code_entropy_bits": float(np.log2(use["perplexity"])),
        "codebook_perplexity": use["perplexity"],
    }


def _count(codes: np.ndarray, *, size: int) -> np.ndarray:
    if not np.issubdtype(codes.dtype, np.integer):
        raise UsageError(f"codes are integers, not {codes.dtype}: a VAE has no codebook")
    if codes.size and not (codes.min() >= 0 and codes.max() < size):
        raise UsageError(
            f"codes from {codes.min()} to {codes.max()} are not of a codebook of {size} codes"
        )
    return np.bincount(codes.reshape(-1).astype(np.int64), minlength=size)


def _frames(x: ArrayLike, y: ArrayLike, *, min_side: int) -> tuple[jax.Array, jax.Array]:
    """Both as float32 frames in [-1, 1], checked."""
    x_BHWC, y_BHWC = jnp.asarray(x), jnp.asarray(y)
    if x_BHWC.shape != y_BHWC.shape:
        raise UsageError(f"frames of {x_BHWC.shape} and {y_BHWC.shape} cannot be compared")
    if x_BHWC.ndim != 4 or x_BHWC.shape[-1] != 3:
        raise UsageError(f"frames are [B, H, W, 3], not {x_BHWC.shape}")
    if min(x_BHWC.shape[1:3]) < min_side:
        height, width = x_BHWC.shape[1:3]
        raise UsageError(f"frames of {height}x{width} are too small: at least {min_side} a side")
    return _to_float(x_BHWC), _to_float(y_BHWC)


def _to_float(x_BHWC: jax.Array) -> jax.Array:
    if x_BHWC.dtype == jnp.uint8:
        return x_BHWC.astype(jnp.float32) / 127.5 - 1.0
    if not jnp.issubdtype(x_BHWC.dtype, jnp.floating):
        raise UsageError(f"frames are uint8 or floats in [-1, 1], not {x_BHWC.dtype}")
    return x_BHWC.astype(jnp.float32)


def _similarities(x_BHWC: jax.Array, y_BHWC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The luminance and the contrast-structure term of SSIM in each window within the frame.

    Written with the sum and the difference of the frames, by which both are 1 minus what is lost:
    so they are exact where frames are nearly equal, however flat, dark or bright.
    """
    total, difference = x_BHWC + y_BHWC, x_BHWC - y_BHWC
    # One blur of all moments, not four: a quarter of the program to compile.
    moments = (total, difference, jnp.square(total), jnp.square(difference))
    blurred = jnp.split(_blur(jnp.concatenate(moments, axis=-1)), len(moments), axis=-1)
    mean_t, mean_d, square_t, square_d = blurred
    variance_t = jnp.maximum(square_t - mean_t**2, 0.0)
    variance_d = jnp.maximum(square_d - mean_d**2, 0.0)
    light_t = mean_t + 2.0  # the luminance term counts from black, which is -1 in each frame
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    luminance = 1.0 - mean_d**2 / ((light_t**2 + mean_d**2) / 2 + c1)
    contrast = 1.0 - variance_d / ((variance_t + variance_d) / 2 + c2)
    return luminance, contrast


def _blur(x_BHWC: jax.Array) -> jax.Array:
    """Gaussian means of the windows within the frame: [B, H - 10, W - 10, C].

    Sums of shifted slices, not a convolution: exact in float32 on every backend.
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
    """max(mean, 0) ** weight, with a finite slope at and below 0."""
    positive = mean_B > 0
    return jnp.where(positive, jnp.where(positive, mean_B, 1.0) ** weight, 0.0)
