"""Writes files atomically."""

import contextlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from elastictok_jax.errors import RunError


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
