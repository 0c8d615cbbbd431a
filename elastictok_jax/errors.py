"""The two errors that a user is meant to read; the command line prints their one line."""


class UsageError(ValueError):
    """Bad usage, config or input: the message names the thing and the mend. Exit status 2."""


class RunError(RuntimeError):
    """A failure while running: the message says what is kept and how to go on. Exit status 1."""
