"""Ends a run in which nothing has moved for too long, and leaves the stacks of all threads.

A thread of Python rather than faulthandler's own timer: the waits in jax that hang, on a device or
a peer, let other threads run, and only Python can tell the peers why the run ends. Should code
that holds the interpreter's lock hang, no sign of life comes from this process either, and its
peers end the run.
"""

import faulthandler
import threading
from collections.abc import Callable
from pathlib import Path

from elastictok_jax.parallel.liveness import ANSWER, BEAT, Clock, within
from elastictok_jax.training.async_metrics import IN_FLIGHT


class Watchdog:
    """Calls `end` with the reason when steps stop coming, or what is no step takes too long.

    Args:
      step_timeout: seconds that may pass between steps, 0 for any.
      pause_timeout: seconds that what is no step may take, 0 for any: the first step with its
        compilation and the restoring before it, an evaluation, a checkpoint.
      stacks: file that gets the stacks, as stderr does.
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
        """A step has been sent off, and the one IN_FLIGHT before it has ended."""
        self._sent += 1
        if self._sent > IN_FLIGHT:  # until then it may be peers that still compile or save
            self._since = (Clock(), *self._step)

    def pause(self) -> None:
        """What follows is no step."""
        self._sent = 0
        self._since = (Clock(), *self._pause)

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(BEAT):
            clock, limit, what, key = self._since
            if clock.tick() > limit > 0:
                faulthandler.dump_traceback(2)  # the descriptor of stderr
                saved = within(ANSWER, self._write_stacks)
                where = f"above and in {self._stacks}" if saved else "above"
                self._end(f"{what} for {limit:g} s ({key}). The stacks of all threads are {where}")

    def _write_stacks(self) -> bool:
        with self._stacks.open("w") as file:
            faulthandler.dump_traceback(file)
        return True
