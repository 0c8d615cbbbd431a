"""LPIPS v0.1, the learned perceptual distance between two images, in plain JAX.

Source: Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual
Metric" (arXiv 1801.03924, section 3 and figure 3). ElasticTok adds it to its pixel loss with
weight 0.1. The weights come from `elastictok_jax.perceptual.lpips_weights.load_lpips`.

Shape suffixes: B images, H and W pixels, C channels of one feature map.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from elastictok_jax.errors import UsageError

# Frames with a shorter side are upsampled first: below about 31 pixels AlexNet's last layers have
# no positions left to compare.
MIN_SIDE = 64
# Upsampling a thin strip does not extend its long side beyond this.
MAX_ENLARGED_SIDE = 1024

# ImageNet's channel mean and deviation, converted to the [-1, 1] pixel scale.
_SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
_SCALE = np.array([0.458, 0.448, 0.450], np.float32)
_NORM_EPS = 1e-10

LpipsParams = dict[str, dict[str, np.ndarray]] | dict[str, dict[str, jax.Array]]


class _Conv(NamedTuple):
    """A square convolution with its ReLU and the pooling before it."""

    inputs: int
    outputs: int
    size: int = 3
    stride: int = 1
    padding: int = 1
    pool: int = 0  # side of the stride-2 max pooling before it; 0 for none
    compared: bool = False  # whether LPIPS compares the features after its ReLU


_NETS = {
    "alex": (
        _Conv(3, 64, size=11, stride=4, padding=2, compared=True),
        _Conv(64, 192, size=5, padding=2, pool=3, compared=True),
        _Conv(192, 384, pool=3, compared=True),
        _Conv(384, 256, compared=True),
        _Conv(256, 256, compared=True),
    ),
    "vgg": (
        _Conv(3, 64),
        _Conv(64, 64, compared=True),
        _Conv(64, 128, pool=2),
        _Conv(128, 128, compared=True),
        _Conv(128, 256, pool=2),
        _Conv(256, 256),
        _Conv(256, 256, compared=True),
        _Conv(256, 512, pool=2),
        _Conv(512, 512),
        _Conv(512, 512, compared=True),
        _Conv(512, 512, pool=2),
        _Conv(512, 512),
        _Conv(512, 512, compared=True),
    ),
}
NETS = tuple(_NETS)


def lpips(
    params: LpipsParams,
    x: ArrayLike,
    y: ArrayLike,
    *,
    net: str = "alex",
    dtype: DTypeLike = jnp.float32,
    precision: lax.PrecisionLike = None,
) -> jax.Array:
    """Computes the perceptual distance of each pair of images, float32 [B]; 0 if identical.

    `params` is the result of `load_lpips(net)`; `x` and `y` are floats [B, H, W, 3], RGB in
    [-1, 1], of any size from 1x1. A frame whose short side is below 64 pixels is upsampled
    bilinearly to 64, and its long side by the same factor (but at most to 1024): such distances
    are comparable with each other, not with those of larger frames.

    The convolutions run in `dtype` whatever the inputs' dtype, the comparison in float32.
    `precision` is XLA's: by default accelerators multiply float32 at reduced precision, which is
    fine for a loss; pass "highest" for reported values. The gradient is finite everywhere; if
    x == y, both the gradient and the distance are 0 up to rounding.

    Raises UsageError for an unknown net or invalid images.
    """
    layers = _layers(net)
    x_BHWC, y_BHWC = _images(x, y)
    # Two passes instead of one of 2B images: the gradient of x then needs no backward pass of y.
    features_x = _features(params, x_BHWC, layers=layers, dtype=dtype, precision=precision)
    features_y = _features(params, y_BHWC, layers=layers, dtype=dtype, precision=precision)
    total_B = jnp.zeros(x_BHWC.shape[0], jnp.float32)
    for i, (fx_BHWC, fy_BHWC) in enumerate(zip(features_x, features_y, strict=True)):
        head_C = jnp.asarray(params[f"head_{i}"]["kernel"], jnp.float32)
        square_BHWC = jnp.square(_unit(fx_BHWC) - _unit(fy_BHWC))
        total_B += jnp.mean(jnp.sum(square_BHWC * head_C, axis=-1), axis=(1, 2))
    return total_B


def lpips_network_shapes(net: str) -> dict[str, dict[str, tuple[int, ...]]]:
    """Returns the shape of every weight of `net`: convolutions HWIO, their biases, heads [C].

    Raises UsageError for an unknown net.
    """
    layers = _layers(net)
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for i, conv in enumerate(layers):
        kernel = (conv.size, conv.size, conv.inputs, conv.outputs)
        shapes[f"conv_{i}"] = {"kernel": kernel, "bias": (conv.outputs,)}
    compared = [conv for conv in layers if conv.compared]
    for i, conv in enumerate(compared):
        shapes[f"head_{i}"] = {"kernel": (conv.outputs,)}
    return shapes


def _layers(net: str) -> tuple[_Conv, ...]:
    if net not in _NETS:
        raise UsageError(f"unknown LPIPS net {net!r}: choose one of {', '.join(_NETS)}")
    return _NETS[net]


def _images(x: ArrayLike, y: ArrayLike) -> tuple[jax.Array, jax.Array]:
    x_BHWC, y_BHWC = jnp.asarray(x), jnp.asarray(y)
    if x_BHWC.shape != y_BHWC.shape:
        raise UsageError(f"LPIPS compares equal shapes, not {x_BHWC.shape} with {y_BHWC.shape}")
    if x_BHWC.ndim != 4 or x_BHWC.shape[-1] != 3 or 0 in x_BHWC.shape[1:3]:
        raise UsageError(f"LPIPS compares images [B, H, W, 3], not {x_BHWC.shape}")
    for image in (x_BHWC, y_BHWC):
        if not jnp.issubdtype(image.dtype, jnp.floating):
            raise UsageError(f"LPIPS takes floats in [-1, 1], not {image.dtype}: x / 127.5 - 1")
    return _enlarge(x_BHWC.astype(jnp.float32)), _enlarge(y_BHWC.astype(jnp.float32))


def _enlarge(x_BHWC: jax.Array) -> jax.Array:
    batch, height, width, channels = x_BHWC.shape
    short = min(height, width)
    if short >= MIN_SIDE:
        return x_BHWC
    sides = [
        min(round(side * MIN_SIDE / short), max(side, MAX_ENLARGED_SIDE))
        for side in (height, width)
    ]
    return jax.image.resize(x_BHWC, (batch, *sides, channels), "bilinear")


def _features(
    params: LpipsParams,
    x_BHWC: jax.Array,
    *,
    layers: tuple[_Conv, ...],
    dtype: DTypeLike,
    precision: lax.PrecisionLike,
) -> list[jax.Array]:
    """Returns the feature maps that LPIPS compares, float32 [B, H', W', C] each."""
    h_BHWC = ((x_BHWC - _SHIFT) / _SCALE).astype(dtype)
    compared = []
    for i, conv in enumerate(layers):
        weights = params[f"conv_{i}"]
        if conv.pool:
            h_BHWC = _max_pool(h_BHWC, side=conv.pool)
        h_BHWC = lax.conv_general_dilated(
            h_BHWC,
            jnp.asarray(weights["kernel"], dtype),
            window_strides=(conv.stride, conv.stride),
            padding=[(conv.padding, conv.padding)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=precision,
        )
        h_BHWC = jax.nn.relu(h_BHWC + jnp.asarray(weights["bias"], dtype))
        if conv.compared:
            compared.append(h_BHWC.astype(jnp.float32))
    return compared


def _max_pool(x_BHWC: jax.Array, *, side: int) -> jax.Array:
    lowest = np.array(-np.inf, x_BHWC.dtype)
    return lax.reduce_window(x_BHWC, lowest, lax.max, (1, side, side, 1), (1, 2, 2, 1), "VALID")


def _unit(f_BHWC: jax.Array) -> jax.Array:
    """Normalises each position's channels to unit length; zero vectors stay zero."""
    square = jnp.sum(jnp.square(f_BHWC), axis=-1, keepdims=True)
    # The gradient of sqrt is infinite at 0, and 0 * inf in the backward pass would be nan.
    some = square > 0
    norm = jnp.where(some, jnp.sqrt(jnp.where(some, square, 1.0)), 0.0)
    return f_BHWC / (norm + _NORM_EPS)
