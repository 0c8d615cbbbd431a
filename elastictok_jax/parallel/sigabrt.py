"""Prints a last line when C++ ends the process: jax calls abort() when it loses its coordinator.

Python's own signal handlers never run then, since abort() does not return to the interpreter; a C
handler that enters Python does.
"""

import contextlib
import ctypes
import os
import signal
from collections.abc import Callable, Iterator

from elastictok_jax.errors import RunError

_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)


@contextlib.contextmanager
def on_abort(last_word: Callable[[], str]) -> Iterator[None]:
    """Makes abort() print `last_word()` and exit with status 1, without a core dump."""

    def handle(number: int) -> None:
        try:
            sigabrt_last_word(last_word())
        finally:
            os._exit(RunError.status)

    install = ctypes.CDLL(None).signal
    install.restype, install.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
    handler = _HANDLER(handle)  # must stay referenced while it may be called
    previous = install(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
    try:
        yield
    finally:
        install(signal.SIGABRT, previous)


@contextlib.contextmanager
def sigabrt_only_last_word(last_word: Callable[[], str]) -> Iterator[None]:
    """Does as `on_abort`, and silences stderr until then: C++ prints a stack trace first."""
    stderr = os.dup(2)

    def spoken() -> str:
        os.dup2(stderr, 2)
        return last_word()

    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        with on_abort(spoken):
            yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def sigabrt_last_word(text: str) -> None:
    """Writes one error line to stderr, bypassing Python's buffers, even if other code is stuck."""
    os.write(2, f"elastictok: error: {text}\n".encode())
