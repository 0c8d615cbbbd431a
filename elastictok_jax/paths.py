"""Paths as users write them, and as ffmpeg and logs take them: `~` is expanded, and empty paths and
unusable URLs are refused."""

import os
import re
from pathlib import Path

from elastictok_jax.errors import UsageError

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # `Path` drops one of the two slashes


def has_scheme(text: str) -> bool:
    """Returns whether `text` is a URL such as `gs://bucket/folder`."""
    return _SCHEME.match(text) is not None


def expand_input_path(text: str) -> str:
    """Returns a path or URL to read, with `~` expanded.

    Raises:
      UsageError: if it is empty.
    """
    if not text.strip():
        raise UsageError("a path is empty: write . for the current folder")
    return text if has_scheme(text) else os.path.expanduser(text)


def local_path(text: str) -> Path:
    """Returns a path on this machine, with `~` expanded.

    Raises:
      UsageError: if it is empty or a URL.
    """
    text = expand_input_path(text)
    if has_scheme(text):
        scheme = text.partition(":")[0]
        raise UsageError(
            f"{text}: {scheme}:// works for the inputs of `elastictok prepare` only: give a path "
            "on this machine or on a mounted file system"
        )
    return Path(text)


def local_text(text: str) -> str:
    """Returns `local_path` as text."""
    return os.fspath(local_path(text))


def path_text(path: str | os.PathLike) -> str:
    r"""Returns a path as text that is valid UTF-8 and the same under every locale.

    File names are bytes on disk. Bytes that are not UTF-8 are written as \xNN.
    """
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def file_url(path) -> str:
    """Returns `path` as a URL, so that ffmpeg reads no protocol into a name like `12:30.mp4`."""
    return f"file:{os.fspath(path)}"
