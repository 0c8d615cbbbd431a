"""Errors that are meant for the user, and the exit statuses of the program.

The command line prints the message of such an error on one line and exits with its `status`.
Without an error it exits with 0, STOPPED or INTERRUPTED.
"""

STOPPED = 75  # stopped in order with everything saved: run the same command again (EX_TEMPFAIL)
INTERRUPTED = 130  # by Ctrl-C where nothing could be saved, as of a program that SIGINT ends


class UsageError(ValueError):
    """Bad usage, config or input: the message names the thing and the fix."""

    status = 2  # of the process


class RunError(RuntimeError):
    """A failure while running: the message says what is kept and how to go on."""

    status = 1


class ReaderGone(RunError):
    """The reader of standard output is gone, as in `elastictok experiments | head -1`."""

    status = 141  # as of a program that SIGPIPE ends


def first_line(error: BaseException, *, until: tuple[str, ...] = ()) -> str:
    """Returns the first line of an error's text up to any of `until`; its type if that is empty."""
    line = (str(error).strip().splitlines() or [""])[0]
    for mark in until:
        line = line.partition(mark)[0]
    return line.strip() or type(error).__name__
