"""The errors that a user is meant to read; the command line prints their one line."""


class UsageError(ValueError):
    """Bad usage, config or input: the message names the thing and the fix."""

    status = 2  # of the process


class RunError(RuntimeError):
    """A failure while running: the message says what is kept and how to go on."""

    status = 1


class ReaderGone(RunError):
    """The reader of standard output has gone, as in `elastictok experiments | head -1`."""

    status = 141  # as of a program that SIGPIPE ends
