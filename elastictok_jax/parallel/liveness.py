"""Ends all processes of a run, with the reason, when one of them fails, hangs or dies.

Every process sends a heartbeat each second through jax's coordination service, which process 0
hosts. Process 0 watches the heartbeats; the others watch process 0. A process that fails says so
before it exits. jax's own heartbeats are a fallback: they end a process by abort() with a C++ stack
trace and do not say what was saved.
"""

import contextlib
import json
import os
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

from elastictok_jax.errors import RunError, UsageError
from elastictok_jax.parallel import distributed
from elastictok_jax.parallel.sigabrt import on_abort, sigabrt_last_word

BEAT = 1.0  # seconds between heartbeats
LOST = 30.0  # seconds without a heartbeat until a process counts as lost
ANSWER = 10.0  # seconds to wait for a disk or the network while a process exits


class Peers:
    """The processes of a run, as seen by one of them; a single process starts no threads.

    Args:
      kept: returns a sentence on what is saved and how to go on.

    Attributes:
      process, processes: index of this process, and their number.
      before_end: called before a failure here ends all processes, to finish a pending save.
    """

    def __init__(self, *, kept: Callable[[], str]):
        distributed.begin_distributed_run()
        self._kept = kept
        self._signs, self._verdict = (
            distributed.run_scoped_key("signs/"),
            distributed.run_scoped_key("verdict"),
        )
        self.before_end: Callable[[], None] = lambda: None
        self._client = distributed.coordination_client()
        self.process, self.processes = distributed.process_place()
        self.name = f"process {self.process} of {self.processes} ({socket.gethostname()})"
        self._state = "alive"  # then "done" or "failed"
        self._left = threading.Event()
        self._last_word = threading.Lock()
        self._answers = 0  # received from process 0

    @contextlib.contextmanager
    def shared_fate(self) -> Iterator[None]:
        """Ends all processes if code inside fails here, and this one if another process fails.

        With several processes an error does not propagate out of it, since jax and orbax would
        wait for the others at exit. The exit status is 2 for a UsageError, else 1.
        """
        if self._client is None:
            yield
            return
        threads = [
            threading.Thread(target=work, name=f"peers {work.__name__}", daemon=True)
            for work in (self._give_signs, self._watch_first)
        ]
        for thread in threads:
            thread.start()
        with on_abort(self._why_aborted):
            try:
                yield
            except (RunError, UsageError, OSError) as error:
                result_within(LOST, self.before_end)  # a checkpoint may be being written
                usage = isinstance(error, UsageError)
                self.end(str(error), status=UsageError.status if usage else RunError.status)
            except Exception as error:  # a collective that failed because a peer did, or a bug
                traceback.print_exc()
                self._state = "failed"
                time.sleep(
                    LOST + 5 * BEAT
                )  # the verdict ends this process first, with the true cause
                reason = (str(error).splitlines() or [""])[0]
                self.end(f"{type(error).__name__}: {reason}. {self.kept()}")
            self._state = "done"
            self._client.key_value_set(*self._sign(), allow_overwrite=True)
            self._left.set()
            for thread in threads:
                thread.join()

    def kept(self) -> str:
        """Returns a sentence on what is saved and how to go on, even if the disk hangs."""
        return result_within(ANSWER, self._kept) or "See in the workdir what is saved"

    def end(self, message: str, *, status: int = RunError.status) -> NoReturn:
        """Ends this process and all others, even if their main threads are stuck."""
        if self._client is not None:
            result_within(
                ANSWER, lambda: self._give_verdict(f"{self.name} failed: {message}", status)
            )
        self._exit(message, status)

    def _give_verdict(self, message: str, status: int) -> None:
        with contextlib.suppress(RuntimeError):  # there is one already
            verdict = {"message": message, "status": status}
            self._client.key_value_set(self._verdict, json.dumps(verdict))

    def _exit(self, message: str, status: int) -> NoReturn:
        self._last_word.acquire()  # only one thread prints and exits
        if self._client is not None and self.process == 0:
            time.sleep(5 * BEAT)  # the others read the verdict from this process, and exit first
        sigabrt_last_word(message)
        os._exit(status)

    def _sign(self) -> tuple[str, str]:
        sign = {"name": self.name, "state": self._state, "at": time.monotonic()}
        return f"{self._signs}{self.process}", json.dumps(sign)

    def _give_signs(self) -> None:
        """Sends heartbeats. Calls hang when process 0 does, so another thread watches process 0."""
        signs = Heartbeats(self.processes)
        while not self._left.wait(BEAT):
            try:
                self._client.key_value_set(*self._sign(), allow_overwrite=True)
                if self.process == 0:
                    wrong = signs.read(dict(self._client.key_value_dir_get(self._signs)))
                    if wrong:
                        self._give_verdict(f"{wrong}. {self.kept()}", RunError.status)
                verdict = self._read_verdict()
            except RuntimeError:
                continue  # process 0 does not answer
            self._answers += 1
            if verdict is not None:
                self._exit(verdict["message"], verdict["status"])

    def _read_verdict(self) -> dict | None:
        try:
            return json.loads(self._client.key_value_try_get(self._verdict))
        except RuntimeError:  # there is none
            return None

    def _watch_first(self) -> None:
        """Ends this process when process 0 has not answered for LOST seconds."""
        clock, answers = Clock(), 0
        while self.process != 0 and not self._left.wait(BEAT):
            if self._answers != answers:
                clock, answers = Clock(), self._answers
            if clock.tick() > LOST:
                self._exit(
                    f"{_lost_process_message(self._first())}. {self.kept()}", RunError.status
                )

    def _first(self) -> str:
        return f"process 0 of {self.processes} ({distributed.coordinator_address()[0]})"

    def _why_aborted(self) -> str:
        gone = False
        if self.process != 0:
            try:
                socket.create_connection(distributed.coordinator_address(), ANSWER).close()
            except OSError:
                gone = True
        if gone:
            return f"{self._first()} was lost: it has died or was killed. {self.kept()}"
        return f"{self.name} was ended by jax, for the reason above. {self.kept()}"


class Clock:
    """Measures seconds, without time in which this process was itself stopped."""

    def __init__(self) -> None:
        self._seconds, self._last = 0.0, time.monotonic()

    def tick(self) -> float:
        """Returns all seconds so far; must be called every BEAT."""
        now = time.monotonic()
        self._seconds += min(now - self._last, 3 * BEAT)
        self._last = now
        return self._seconds


class Heartbeats:
    """Tracks the heartbeats of all processes, in process 0."""

    def __init__(self, processes: int):
        self._last = [""] * processes
        self._silent = [Clock() for _ in range(processes)]

    def read(self, signs: dict[str, str]) -> str | None:
        """Reads the latest heartbeat of each process, by key; returns what is wrong, or None."""
        found = {int(key.rpartition("/")[2]): sign for key, sign in signs.items()}
        states = set()
        for process, last in enumerate(self._last):
            sign = found.get(process, last)
            known = json.loads(sign) if sign else {"name": f"process {process}", "state": "alive"}
            states.add(known["state"])
            if sign != last or known["state"] == "done":
                self._last[process], self._silent[process] = sign, Clock()
            if self._silent[process].tick() > LOST:
                return _lost_process_message(known["name"])
        if "failed" in states and "alive" not in states:
            return "all processes failed, each for the reason in its log"
        return None


def _lost_process_message(who: str) -> str:
    """Returns the sentence that says that a process was lost."""
    return (
        f"{who} was lost: no sign of life for {LOST:.0f} s, so it was killed or stopped, or its "
        "machine or network is gone"
    )


def result_within(seconds: float, function: Callable):
    """Returns the result of `function`; None if it fails, or takes longer and is left running."""
    result = []

    def call() -> None:
        with contextlib.suppress(Exception):
            result.append(function())

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    return result[0] if result else None
