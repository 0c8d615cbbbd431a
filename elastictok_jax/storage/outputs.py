"""Checks before any work that outputs can be written, and removes those of an earlier run."""

import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from elastictok_jax.errors import UsageError


def make_output_folder(folder: Path) -> None:
    """Makes a folder and checks that it can be written; to be called before any work.

    Raises:
      UsageError: if `folder` cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try_output_file(folder / "trial")
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be written ({error.strerror}): choose another -o"
        ) from None


def remove_outputs(folder: Path, names: Sequence[str]) -> None:
    """Removes the outputs of an earlier run, so that a folder never mixes files of two runs.

    Call it only once there are new files to put in their place.
    """
    for name in names:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def try_output_file(path: Path) -> None:
    """Writes and removes a small file beside `path`; raises OSError if that is not possible."""
    trial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        trial.write_bytes(b"0")
    finally:
        trial.unlink(missing_ok=True)


def require_output_file(path: Path, *, change: str) -> None:
    """Raises UsageError if no file can be made or replaced at `path`."""
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        try_output_file(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error.strerror}): {change}") from None
