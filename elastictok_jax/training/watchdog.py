"""Ends a run that has made no progress for too long, and writes the stacks of all threads.

It is a Python thread rather than faulthandler's own timer: jax releases the GIL while it waits for
a device or a peer, and only Python can tell the peers why the run ends. If code that holds the GIL
hangs, this process sends no heartbeats either, and its peers end the run.
"""

import faulthandler
import threading
from collections.abc import Callable
from pathlib import Path

from elastictok_jax.parallel.liveness import ANSWER, BEAT, Clock, result_within
from elastictok_jax.training.async_metrics import IN_FLIGHT


class Watchdog:
    """Calls `end` with the reason when a step, or a pause between steps, takes too long.

    Args:
      step_timeout: seconds allowed between steps, 0 for no limit.
      pause_timeout: seconds allowed for a pause, 0 for no limit: an evaluation, a checkpoint, or
        the first step with its compilation and the restore before it.
      stacks: file that the stacks are written to, besides stderr.
    """

    def __init__(
        self,
        *,
        step_timeout: float,
        pause_timeout: float,
        stacks: Path,
        end: Callable[[str], None],
    ):
        self._step = (step_timeout, "no step has ended", "train.step_timeout")
        self._pause = (
            pause_timeout,
            "a first step, evaluation or checkpoint has not ended",
            "train.pause_timeout",
        )
        self._stacks, self._end = stacks, end
        self._closed = threading.Event()
        self.pause()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def step(self) -> None:
        """Notes that a step was dispatched, and that the one IN_FLIGHT before it has ended."""
        self._sent += 1
        if self._sent > IN_FLIGHT:  # until then, peers may still compile or save
            self._since = (Clock(), *self._step)

    def pause(self) -> None:
        """Notes that a pause begins: what follows is not a step."""
        self._sent = 0
        self._since = (Clock(), *self._pause)

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(BEAT):
            clock, limit, what, key = self._since
            if clock.tick() > limit > 0:
                faulthandler.dump_traceback(2)  # the descriptor of stderr
                saved = result_within(ANSWER, self._write_stacks)
                where = f"above and in {self._stacks}" if saved else "above"
                self._end(f"{what} for {limit:g} s ({key}). The stacks of all threads are {where}")

    def _write_stacks(self) -> bool:
        with self._stacks.open("w") as file:
            faulthandler.dump_traceback(file)
        return True
