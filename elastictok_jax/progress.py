"""Progress of long work: a bar on a terminal, an occasional line in a log."""

import sys
import time

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30


class Progress:
    """Shows the progress of `what`, as a context; `unit` is what is counted, in the singular."""

    def __init__(self, what: str, *, unit: str) -> None:
        self._what, self._unit = what, unit
        self._terminal = sys.stderr.isatty()
        self._bar: tqdm | None = None
        self._said = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, done: int, total: int | None) -> None:
        """Updates the count; `total` is None if unknown."""
        if self._terminal:
            if self._bar is None:
                self._bar = tqdm(
                    total=total, desc=self._what, unit=self._unit, dynamic_ncols=True, leave=False
                )
            self._bar.update(done - self._bar.n)
        elif time.monotonic() - self._said > SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            of = "" if total is None else f" of {total}"
            print(f"{self._what}: {done}{of} {self._unit}s", file=sys.stderr, flush=True)
