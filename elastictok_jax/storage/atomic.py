"""Writes files atomically, and checks before any work that they can be written."""

import contextlib
import csv
import errno
import io
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from elastictok_jax.errors import RunError, UsageError


def make_folder(folder: Path) -> None:
    """Makes a folder and checks that it can be written; to be called before any work.

    Raises:
      UsageError: if `folder` cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try_file(folder / "trial")
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


def try_file(path: Path) -> None:
    """Writes and removes a small file beside `path`; raises OSError if that is not possible."""
    trial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        trial.write_bytes(b"0")
    finally:
        trial.unlink(missing_ok=True)


def require_file(path: Path, *, change: str) -> None:
    """Raises UsageError if no file can be made or replaced at `path`."""
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        try_file(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error.strerror}): {change}") from None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, which it replaces only on success.

    All atomic writes go through here: a reader sees the old file or the new one, and a killed
    process leaves at most a hidden file. The suffix is that of `path`, since some writers choose
    the format by it.
    """
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # for example if its parent is not a folder
            temporary.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file atomically.

    Raises:
      RunError: if it cannot be written.
    """
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        raise RunError(
            f"{path} cannot be written ({error.strerror}): make room or choose another place, then "
            "run the same command again"
        ) from error


def write_json(path: Path, value: object) -> None:
    """Writes JSON atomically; raises ValueError for a number that JSON cannot represent."""
    write_atomically(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def csv_columns(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the keys of rows in order, without those that are None in every row."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return [key for key in keys if any(row.get(key) is not None for row in rows)]


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes rows, whose keys may differ, as CSV with a header; None gives an empty cell."""
    text = io.StringIO()
    keys = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(text, keys, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode(errors="backslashreplace"))
