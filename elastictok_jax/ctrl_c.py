"""Turns Ctrl-C into one line that says how to go on and status INTERRUPTED, at any moment.

The first Ctrl-C raises KeyboardInterrupt in the main thread, so that temporary files are removed
and worker processes exit. C++ can delay the exception and a callback can swallow it, so a thread
ends the process after GRACE seconds; a second Ctrl-C ends it at once. After the first one, nothing
else can write to stderr, since libraries print tracebacks while they are torn down.

The training loop handles Ctrl-C itself (training/stop_signal.py): it saves and exits with STOPPED.
"""

import atexit
import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from elastictok_jax.errors import INTERRUPTED

GRACE = 5.0  # seconds for the main thread to clean up and exit
ECHO = 0.3  # seconds within which a second signal is the same Ctrl-C, forwarded by a launcher
ADVICE = {
    "train": "run the same command again to go on from the newest checkpoint",
    "evaluate": "measured clips are kept; run the same command again to go on",
    "prepare": "finished shards are kept; run the same command again to go on",
}
OTHER_ADVICE = "nothing is left half-written; run the same command again"


class _State:
    interrupted = False  # by a first Ctrl-C
    finished = False  # the command has returned
    taken_over = False  # by code that cleans up and reports by itself
    held = False  # while a child process starts
    pending = False  # a Ctrl-C came while held
    swallowed = False  # a finalizer or a callback ate the KeyboardInterrupt
    said = False  # the line is printed
    stderr = 2  # a descriptor that still leads to the terminal


def install_ctrl_c_handler() -> None:
    """Installs the SIGINT handler; must be called in the main thread of the program."""
    _State.stderr = os.dup(2)
    signal.signal(signal.SIGINT, _handle)
    import threading  # imported after the handler is set, since a signal may arrive during imports

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    sys.unraisablehook = _unraisable
    # Processes that exit at once leak semaphores: multiprocessing removes them and would warn.
    sys.warnoptions.append("ignore:resource_tracker:UserWarning")
    # Registered first, so called last: after it, Python would restore the default action of SIGINT.
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_watch, args=(reader,), name="ctrl-c", daemon=True).start()


def ctrl_c_pressed() -> bool:
    """Returns whether a first Ctrl-C has arrived."""
    return _State.interrupted


def take_over_ctrl_c() -> None:
    """Lifts the deadline and reopens stderr, for code that handles a KeyboardInterrupt itself."""
    if _State.interrupted:
        _State.taken_over = True
        os.dup2(_State.stderr, 2)


def end_at_next_ctrl_c() -> None:
    """Makes a later Ctrl-C end the process at once, since the command has done its work."""
    _State.finished = True
    signal.signal(signal.SIGINT, lambda number, frame: end_interrupted())


def _say_interrupted() -> None:
    """Prints the line once, unless the code that took over prints its own."""
    if _State.said or _State.taken_over:
        return
    _State.said = True
    verb = sys.argv[1] if len(sys.argv) > 1 else ""
    advice = ADVICE.get(verb, OTHER_ADVICE)
    if _State.finished and not _State.interrupted:
        advice = "the command had done its work"
    start = "\r\033[K" if os.isatty(_State.stderr) else ""  # over a progress bar
    with contextlib.suppress(OSError):
        os.write(_State.stderr, f"{start}elastictok: interrupted: {advice}\n".encode())


@contextlib.contextmanager
def keep_ctrl_c_from_children() -> Iterator[None]:
    """Makes processes that this thread starts inside ignore Ctrl-C: this process ends them.

    A terminal sends Ctrl-C to all processes, and a child may not have loaded Python's modules yet.
    A Ctrl-C that arrives here is held until the context exits, so that no child is half started.
    """
    import threading
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # if the first child started it, that would unblock SIGINT
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    here = threading.current_thread() is threading.main_thread()
    _State.held, _State.pending = here, False
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        _State.held = False
        if _State.pending and not _State.interrupted:
            _handle(signal.SIGINT, None)


def _handle(number: int, frame: FrameType | None) -> None:
    if _State.interrupted or _State.held:
        _State.pending = True
        return  # the watching thread counts signals
    _State.interrupted = True
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    if _loads_extension(frame):
        end_interrupted()
    raise KeyboardInterrupt


def _loads_extension(frame: FrameType | None) -> bool:
    """Returns whether a C extension is being loaded: loading jaxlib's crashes if that raises."""
    while frame is not None:
        code = frame.f_code
        if code.co_filename.endswith("_bootstrap_external>") and code.co_name.endswith("_module"):
            loader = frame.f_locals.get("self")
            if type(loader).__name__ == "ExtensionFileLoader":
                return True
        frame = frame.f_back
    return False


def _watch(reader: int) -> None:
    """Ends the process if the main thread does not; each signal writes a byte to `reader`."""
    import ctypes
    import select
    import threading
    import time

    main = ctypes.c_ulong(threading.main_thread().ident or 0)
    first = None
    while True:
        ready = select.select([reader], [], [], None if first is None else 0.1)[0]
        now = time.monotonic()
        numbers = os.read(reader, 64) if ready else b""
        if signal.SIGINT in numbers and signal.getsignal(signal.SIGINT) is _handle:
            if first is None:
                first = now
            elif now - first > ECHO:
                end_interrupted()
        if first is not None and not _State.taken_over and now - first > GRACE:
            end_interrupted()
        if _State.swallowed:
            _State.swallowed = False
            ctypes.pythonapi.PyThreadState_SetAsyncExc(main, ctypes.py_object(KeyboardInterrupt))


def end_interrupted() -> NoReturn:
    """Kills child processes, prints the line, and exits at once with INTERRUPTED."""
    with contextlib.suppress(Exception):
        processes = sys.modules.get("multiprocessing.process")
        for child in processes.active_children() if processes else ():
            child.kill()
    _say_interrupted()
    os._exit(INTERRUPTED)


def _unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        _State.swallowed = True
    else:
        sys.__unraisablehook__(unraisable)
