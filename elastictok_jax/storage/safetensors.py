"""Stores parameters in one safetensors file: flat names joined by '/', and string metadata."""

import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from elastictok_jax.errors import UsageError
from elastictok_jax.storage.atomic import replacing

_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_MAX_DEPTH = 32  # a deeper tree is hostile, since tree functions recurse


def save_safetensors(path: str | os.PathLike, params: dict, *, metadata: dict[str, str]) -> None:
    """Writes `params` to `path` atomically.

    Args:
      path: file to write; its folder must exist.
      params: nested dict of float32, float16 or bfloat16 arrays of any shape.
      metadata: strings stored beside the weights.

    Raises:
      UsageError: if a weight has another dtype or a name that contains '/', or the file cannot be
        written.
    """
    path = Path(path)
    flat: dict[str, np.ndarray] = {}
    for key, leaf in traverse_util.flatten_dict(params).items():
        name = "/".join(key)
        if not all(key) or any("/" in part for part in key):
            raise UsageError(f"{path}: weight name {name!r} has an empty part or a '/' in a part")
        flat[name] = np.asarray(leaf, order="C")  # safetensors ignores strides
        if flat[name].dtype not in _DTYPES.values():
            raise UsageError(
                f"{path}: weight {name} is {flat[name].dtype}; "
                "cast it to float32, float16 or bfloat16 before saving"
            )
    try:
        with replacing(path) as temporary:
            safetensors.numpy.save_file(flat, temporary, metadata=metadata)
    except (OSError, safetensors.SafetensorError) as error:
        raise UsageError(f"cannot write {path}: {error}") from error


def load_safetensors(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, str]]:
    """Reads what `save_safetensors` wrote.

    Returns:
      The nested dict of numpy arrays, in the stored dtype, and the metadata ({} if none).

    Raises:
      UsageError: if there is no such file, it is truncated or not safetensors, a dtype is not
        float32, float16 or bfloat16, or the names do not form a tree.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            names = sorted(file.keys())
            _check_names(names, path=path)
            for name in names:
                dtype = file.get_slice(name).get_dtype()
                if dtype not in _DTYPES:
                    raise UsageError(
                        f"{path}: weight {name} is {dtype}; this file needs {', '.join(_DTYPES)}"
                    )
            flat = {tuple(name.split("/")): file.get_tensor(name) for name in names}
            return traverse_util.unflatten_dict(flat), dict(file.metadata() or {})
    except (OSError, safetensors.SafetensorError) as error:
        raise UsageError(
            f"{path}: not a complete safetensors file ({error}); copy or export it again"
        ) from error


def _check_names(names: list[str], *, path: Path) -> None:
    """Raises UsageError unless the names are the leaves of one tree of modest depth."""
    leaves = set(names)
    for name in names:
        parts = name.split("/")
        if not name.isprintable() or not all(parts) or len(parts) > _MAX_DEPTH:
            raise UsageError(f"{path}: {name[:200]!r} is not a weight name such as encoder/kernel")
        for depth in range(1, len(parts)):
            if "/".join(parts[:depth]) in leaves:
                raise UsageError(f"{path}: weight {name} is nested under another weight")
