"""I3D, the video classifier behind the Frechet video distance, in plain JAX.

Source: Carreira and Zisserman 2017, "Quo Vadis, Action Recognition?" (arXiv 1705.07750, figure
3): the Inception network with its filters inflated over time. This is the RGB stream, trained on
ImageNet and Kinetics-400, for inference only. The weights come from
`elastictok_jax.perceptual.i3d_weights.load_i3d`.

Shape suffixes: B clips, T frames, H and W pixels, C channels of one feature map.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from elastictok_jax.errors import UsageError

SIDE = 224
# Time is downsampled by 8, rounding up, and the last pooling needs 2 positions.
MIN_FRAMES = 9
CLASSES = 400

_NORM_EPS = 1e-3

I3dParams = dict[str, dict[str, np.ndarray]] | dict[str, dict[str, jax.Array]]


class _Unit(NamedTuple):
    """A convolution with a cubic kernel, its normalization and ReLU."""

    name: str
    inputs: int
    outputs: int
    size: int = 1
    stride: int = 1


class _Mixed(NamedTuple):
    """An Inception module: four branches on the same input, concatenated."""

    name: str
    inputs: int
    point: int  # outputs of the 1x1x1 branch
    narrow: tuple[int, int]  # outputs of the 1x1x1 convolutions of the two 3x3x3 branches
    cube: tuple[int, int]  # outputs of their 3x3x3 convolutions
    pooled: int  # outputs of the branch of 3x3x3 max pooling, then 1x1x1

    def branches(self) -> tuple[tuple[_Unit, ...], ...]:
        """Returns the units of each branch; those of the last branch follow the pooling."""
        first = (_Unit(f"{self.name}/point", self.inputs, self.point),)
        cubes = [
            (
                _Unit(f"{self.name}/narrow_{i}", self.inputs, narrow),
                _Unit(f"{self.name}/cube_{i}", narrow, cube, size=3),
            )
            for i, (narrow, cube) in enumerate(zip(self.narrow, self.cube, strict=True))
        ]
        last = (_Unit(f"{self.name}/pooled", self.inputs, self.pooled),)
        return first, *cubes, last


class _Pool(NamedTuple):
    """Max pooling, with its window and strides over time, height and width."""

    window: tuple[int, int, int]
    strides: tuple[int, int, int]


_LAYERS: tuple[_Unit | _Mixed | _Pool, ...] = (
    _Unit("conv_1a", 3, 64, size=7, stride=2),
    _Pool((1, 3, 3), (1, 2, 2)),
    _Unit("conv_2b", 64, 64),
    _Unit("conv_2c", 64, 192, size=3),
    _Pool((1, 3, 3), (1, 2, 2)),
    _Mixed("mixed_3b", 192, point=64, narrow=(96, 16), cube=(128, 32), pooled=32),
    _Mixed("mixed_3c", 256, point=128, narrow=(128, 32), cube=(192, 96), pooled=64),
    _Pool((3, 3, 3), (2, 2, 2)),
    _Mixed("mixed_4b", 480, point=192, narrow=(96, 16), cube=(208, 48), pooled=64),
    _Mixed("mixed_4c", 512, point=160, narrow=(112, 24), cube=(224, 64), pooled=64),
    _Mixed("mixed_4d", 512, point=128, narrow=(128, 24), cube=(256, 64), pooled=64),
    _Mixed("mixed_4e", 512, point=112, narrow=(144, 32), cube=(288, 64), pooled=64),
    _Mixed("mixed_4f", 528, point=256, narrow=(160, 32), cube=(320, 128), pooled=128),
    _Pool((2, 2, 2), (2, 2, 2)),
    _Mixed("mixed_5b", 832, point=256, narrow=(160, 32), cube=(320, 128), pooled=128),
    _Mixed("mixed_5c", 832, point=384, narrow=(192, 48), cube=(384, 128), pooled=128),
)
_LAST = 1024  # channels of mixed_5c


def i3d_logits(
    params: I3dParams, clips: ArrayLike, *, precision: lax.PrecisionLike = "highest"
) -> jax.Array:
    """Computes the logits of the 400 classes of Kinetics, averaged over time, float32 [B, 400].

    `params` is the result of `load_i3d()`; `clips` are floats [B, T, 224, 224, 3], RGB in [-1, 1],
    of at least 9 frames. Everything is computed in float32; `precision` is XLA's: less than
    "highest" is faster on accelerators, but wrong in the third digit.

    Raises UsageError for invalid clips.
    """
    h_BTHWC = _clips(clips)
    for layer in _LAYERS:
        if isinstance(layer, _Pool):
            h_BTHWC = _max_pool(h_BTHWC, window=layer.window, strides=layer.strides)
        elif isinstance(layer, _Unit):
            h_BTHWC = _apply(params, layer, h_BTHWC, precision=precision)
        else:
            h_BTHWC = _mix(params, layer, h_BTHWC, precision=precision)
    # The original averages each pair of neighbours in time, applies the head, and averages its
    # outputs; the head is linear, so it can come last.
    pairs_BTC = jnp.mean(h_BTHWC, axis=(2, 3))
    mean_BC = jnp.mean((pairs_BTC[:, 1:] + pairs_BTC[:, :-1]) / 2, axis=1)
    head = params["logits"]
    logits = jnp.matmul(mean_BC, jnp.asarray(head["kernel"]), precision=precision)
    return logits + jnp.asarray(head["bias"])


def i3d_network_shapes() -> dict[str, dict[str, tuple[int, ...]]]:
    """Returns the shape of every weight: kernels THWIO, normalizations [C], the head [C, 400].

    A unit's `mean`, `variance` and `bias` are those of its batch normalization, which has no
    scale.
    """
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for unit in _units():
        kernel = (unit.size, unit.size, unit.size, unit.inputs, unit.outputs)
        channels = (unit.outputs,)
        shapes[unit.name] = {
            "kernel": kernel,
            "mean": channels,
            "variance": channels,
            "bias": channels,
        }
    shapes["logits"] = {"kernel": (_LAST, CLASSES), "bias": (CLASSES,)}
    return shapes


def _units() -> list[_Unit]:
    units = []
    for layer in _LAYERS:
        if isinstance(layer, _Unit):
            units.append(layer)
        elif isinstance(layer, _Mixed):
            units += [unit for branch in layer.branches() for unit in branch]
    return units


def _clips(clips: ArrayLike) -> jax.Array:
    x_BTHWC = jnp.asarray(clips)
    if x_BTHWC.ndim != 5 or x_BTHWC.shape[2:] != (SIDE, SIDE, 3):
        raise UsageError(f"I3D takes clips [B, T, {SIDE}, {SIDE}, 3], not {x_BTHWC.shape}")
    if x_BTHWC.shape[1] < MIN_FRAMES:
        raise UsageError(f"I3D takes {MIN_FRAMES} frames or more, not {x_BTHWC.shape[1]}")
    if not jnp.issubdtype(x_BTHWC.dtype, jnp.floating):
        raise UsageError(f"I3D takes floats in [-1, 1], not {x_BTHWC.dtype}: x / 127.5 - 1")
    return x_BTHWC.astype(jnp.float32)


def _mix(
    params: I3dParams, mixed: _Mixed, x_BTHWC: jax.Array, *, precision: lax.PrecisionLike
) -> jax.Array:
    pooled_BTHWC = _max_pool(x_BTHWC, window=(3, 3, 3), strides=(1, 1, 1))
    starts = (x_BTHWC, x_BTHWC, x_BTHWC, pooled_BTHWC)
    outputs = []
    for start_BTHWC, branch in zip(starts, mixed.branches(), strict=True):
        h_BTHWC = start_BTHWC
        for unit in branch:
            h_BTHWC = _apply(params, unit, h_BTHWC, precision=precision)
        outputs.append(h_BTHWC)
    return jnp.concatenate(outputs, axis=-1)


def _apply(
    params: I3dParams, unit: _Unit, x_BTHWC: jax.Array, *, precision: lax.PrecisionLike
) -> jax.Array:
    weights = params[unit.name]
    h_BTHWC = lax.conv_general_dilated(
        x_BTHWC,
        jnp.asarray(weights["kernel"]),
        window_strides=(unit.stride,) * 3,
        padding="SAME",
        dimension_numbers=("NTHWC", "THWIO", "NTHWC"),
        precision=precision,
    )
    scale_C = lax.rsqrt(jnp.asarray(weights["variance"]) + _NORM_EPS)
    normal_BTHWC = (h_BTHWC - jnp.asarray(weights["mean"])) * scale_C
    return jax.nn.relu(normal_BTHWC + jnp.asarray(weights["bias"]))


def _max_pool(
    x_BTHWC: jax.Array, *, window: tuple[int, int, int], strides: tuple[int, int, int]
) -> jax.Array:
    lowest = np.array(-np.inf, x_BTHWC.dtype)
    return lax.reduce_window(x_BTHWC, lowest, lax.max, (1, *window, 1), (1, *strides, 1), "SAME")
