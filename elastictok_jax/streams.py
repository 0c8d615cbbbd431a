"""The standard streams of the program: closed ones are replaced, and no failure is lost at exit."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator

from elastictok_jax.errors import ReaderGone, RunError


def prepare_streams() -> None:
    """Makes stdin, stdout and stderr usable, whatever the shell has made of them.

    A closed one becomes /dev/null: the next file opened would otherwise take its number, and get
    what C++ prints. What cannot be written to stderr is dropped, since no work should fail for its
    messages. What cannot be written to stdout raises RunError, or ReaderGone.
    """
    for number, mode in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, mode)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = _Stdout(*_options(1, sys.stdout))
    sys.stderr = _Stderr(*_options(2, sys.stderr), line_buffering=True)


def _options(number: int, stream) -> tuple[io.BufferedWriter, str]:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return open(number, "wb", closefd=False), encoding


class _Stdout(io.TextIOWrapper):
    def __init__(self, buffer: io.BufferedWriter, encoding: str):
        # A file's name may hold bytes that are no text of this encoding.
        super().__init__(buffer, encoding, "backslashreplace", line_buffering=os.isatty(1))

    def write(self, text: str, /) -> int:
        with _failure_of_stdout():
            return super().write(text)

    def flush(self) -> None:
        with _failure_of_stdout():
            super().flush()


class _Stderr(io.TextIOWrapper):
    def __init__(self, buffer: io.BufferedWriter, encoding: str, *, line_buffering: bool):
        super().__init__(buffer, encoding, "backslashreplace", line_buffering=line_buffering)

    def write(self, text: str, /) -> int:
        with contextlib.suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()


@contextlib.contextmanager
def _failure_of_stdout() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)  # for what is in the buffer, which is written again at exit
        os.close(nowhere)
        if isinstance(error, BrokenPipeError):
            raise ReaderGone("the reader of standard output is gone") from None
        raise RunError(
            f"standard output cannot be written ({error.strerror}): what was to be printed there "
            "is lost, files are written; run it again with another output"
        ) from None
