"""Handles SIGTERM and Ctrl-C: the first makes the loop save and stop, a second exits at once."""

import os
import signal
from types import FrameType, TracebackType


class StopRequest:
    """Sets `requested` at the first SIGTERM in its context, or SIGINT after `take_interrupts`.

    The second signal exits at once with status 128 + its number; saved checkpoints are kept.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        self._take(signal.SIGTERM)
        return self

    def take_interrupts(self) -> None:
        """Handles SIGINT from the start of the loop on; until then Ctrl-C ends the process."""
        self._take(signal.SIGINT)

    def _take(self, number: signal.Signals) -> None:
        self._previous[number] = signal.signal(number, self._handle)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.requested:
            _say(f"second {name}: exiting at once")
            os._exit(128 + number)
        self.requested = True
        _say(f"{name}: saving, then stopping (again to exit at once)")


def _say(text: str) -> None:
    # Bypasses sys.stderr, which the signal may have interrupted in the middle of a write.
    os.write(2, f"{text}\n".encode())
