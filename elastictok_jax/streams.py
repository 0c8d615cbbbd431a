"""Standard streams that work: closed ones are replaced, and no failed write is lost at exit."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator

from elastictok_jax.errors import ReaderGone, RunError


def prepare_streams() -> None:
    """Makes stdin, stdout and stderr usable, however the shell has set them up.

    A closed stream becomes /dev/null: otherwise the next file opened would take its descriptor and
    receive what C++ prints. A failed write to stderr is ignored, since no work should fail because
    of its messages. A failed write to stdout raises RunError, or ReaderGone for a broken pipe.
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
        # A file name may contain bytes that this encoding cannot represent.
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
        os.dup2(nowhere, 1)  # for the rest of the buffer, which is flushed again at exit
        os.close(nowhere)
        if isinstance(error, BrokenPipeError):
            raise ReaderGone("the reader of standard output is gone") from None
        raise RunError(
            f"standard output cannot be written ({error.strerror}): what was to be printed there "
            "is lost, files are written; run it again with another output"
        ) from None
