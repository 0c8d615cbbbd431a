"""Reads inputs that are not on this machine, through fsspec."""

import shutil
from pathlib import Path

from elastictok_jax.errors import UsageError

EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3"}  # of protocols, in setup.py


def fetch_remote_file(url: str, target: Path) -> None:
    """Copies a remote file to `target`.

    Raises:
      OSError: if it cannot be read.
    """
    system, path = open_remote_file_system(url)
    with system.open(path, "rb") as remote, target.open("wb") as local:
        shutil.copyfileobj(remote, local)


def open_remote_file_system(url: str):
    """Returns the fsspec file system of `url`, and the path in it.

    Raises:
      UsageError: if the package for its protocol is not installed.
    """
    import fsspec

    protocol = url.partition("://")[0]
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        extra = EXTRAS.get(protocol)
        fix = f"pip install 'elastictok_jax[{extra}]'" if extra else str(error)
        raise UsageError(f"{url}: reading {protocol}:// needs another package: {fix}") from None
    except ValueError as error:
        raise UsageError(f"{url}: {error}; use a local path, gs:// or s3://") from None
