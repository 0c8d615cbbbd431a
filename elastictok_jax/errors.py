"""The errors that a user is meant to read, and the exit statuses of the program.

The command line prints the one line of an error and ends with its `status`; without one it ends
with 0 when done, or with STOPPED.
"""

STOPPED = 75  # stopped in order with everything saved: run the same command again (EX_TEMPFAIL)


class UsageError(ValueError):
    """Bad usage, config or input: the message names the thing and the fix."""

    status = 2  # of the process


class RunError(RuntimeError):
    """A failure while running: the message says what is kept and how to go on."""

    status = 1


class ReaderGone(RunError):
    """The reader of standard output has gone, as in `elastictok experiments | head -1`."""

    status = 141  # as of a program that SIGPIPE ends
