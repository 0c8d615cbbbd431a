"""One fate for all processes of a run: when one fails, hangs or dies, all end, and say why.

Every process gives a sign of life each second through jax's coordination service, which process 0
hosts. Process 0 watches the signs; the others watch process 0. A process that fails says so
before it exits. jax's own heartbeats stand behind this, but they end a process by abort() with a
stack trace of C++, and do not say what was saved.
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
from elastictok_jax.parallel.sigabrt import on_abort, say

BEAT = 1.0  # seconds between signs of life
LOST = 30.0  # seconds without one, after which a process is given up
ANSWER = 10.0  # seconds that a disk or the network gets to answer when a process is about to end


class Peers:
    """The processes of a run, as seen by one of them. A single process has none, and no threads.

    Args:
      kept: a sentence on what is saved and how to go on.

    Attributes:
      process, processes: which this is, of how many.
      before_end: called before a failure here ends all, to finish what is being saved.
    """

    def __init__(self, *, kept: Callable[[], str]):
        distributed.begin_run()
        self._kept = kept
        self._signs, self._verdict = distributed.run_key("signs/"), distributed.run_key("verdict")
        self.before_end: Callable[[], None] = lambda: None
        self._client = distributed.client()
        self.process, self.processes = distributed.place()
        self.name = f"process {self.process} of {self.processes} ({socket.gethostname()})"
        self._state = "alive"  # then "done" or "failed"
        self._left = threading.Event()
        self._last_word = threading.Lock()
        self._answers = 0  # that process 0 has given

    @contextlib.contextmanager
    def shared_fate(self) -> Iterator[None]:
        """While inside, an error here ends all processes, and the end of another ends this one.

        In several processes an error does not come out of it: jax and orbax would wait for the
        others at exit. The exit status is 2 for a UsageError, else 1.
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
                within(LOST, self.before_end)  # a good checkpoint may be on its way
                self.end(str(error), status=2 if isinstance(error, UsageError) else 1)
            except Exception as error:  # a collective that failed since a peer did, or a bug
                traceback.print_exc()
                self._state = "failed"
                time.sleep(LOST + 5 * BEAT)  # the verdict ends this, and knows better what is wrong
                reason = (str(error).splitlines() or [""])[0]
                self.end(f"{type(error).__name__}: {reason}. {self.kept()}")
            self._state = "done"
            self._client.key_value_set(*self._sign(), allow_overwrite=True)
            self._left.set()
            for thread in threads:
                thread.join()

    def kept(self) -> str:
        """A sentence on what is saved and how to go on, also where the disk hangs."""
        return within(ANSWER, self._kept) or "See in the workdir what is saved"

    def end(self, message: str, *, status: int = 1) -> NoReturn:
        """Ends this process and all others, whatever their main threads are stuck in."""
        if self._client is not None:
            within(ANSWER, lambda: self._give_verdict(f"{self.name} failed: {message}", status))
        self._exit(message, status)

    def _give_verdict(self, message: str, status: int) -> None:
        with contextlib.suppress(RuntimeError):  # there is one already
            verdict = {"message": message, "status": status}
            self._client.key_value_set(self._verdict, json.dumps(verdict))

    def _exit(self, message: str, status: int) -> NoReturn:
        self._last_word.acquire()  # of two threads, one
        if self._client is not None and self.process == 0:
            time.sleep(5 * BEAT)  # the others hear of it from this process, and end before it
        say(message)
        os._exit(status)

    def _sign(self) -> tuple[str, str]:
        sign = {"name": self.name, "state": self._state, "at": time.monotonic()}
        return f"{self._signs}{self.process}", json.dumps(sign)

    def _give_signs(self) -> None:
        """Signs of life. Every call hangs when process 0 does, so that another thread looks on."""
        signs = Signs(self.processes)
        while not self._left.wait(BEAT):
            try:
                self._client.key_value_set(*self._sign(), allow_overwrite=True)
                if self.process == 0:
                    wrong = signs.read(dict(self._client.key_value_dir_get(self._signs)))
                    if wrong:
                        self._give_verdict(f"{wrong}. {self.kept()}", 1)
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
        """Ends this process when process 0 has not answered for too long."""
        clock, answers = Clock(), 0
        while self.process != 0 and not self._left.wait(BEAT):
            if self._answers != answers:
                clock, answers = Clock(), self._answers
            if clock.tick() > LOST:
                self._exit(f"{lost(self._first())}. {self.kept()}", 1)

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
    """Seconds that this process has seen pass; time in which it was itself stopped is left out."""

    def __init__(self) -> None:
        self._seconds, self._last = 0.0, time.monotonic()

    def tick(self) -> float:
        """All seconds so far. To be called every BEAT."""
        now = time.monotonic()
        self._seconds += min(now - self._last, 3 * BEAT)
        self._last = now
        return self._seconds


class Signs:
    """The signs of life of all processes, as process 0 reads them."""

    def __init__(self, processes: int):
        self._last = [""] * processes
        self._silent = [Clock() for _ in range(processes)]

    def read(self, signs: dict[str, str]) -> str | None:
        """Takes what all have said last, by key; returns what is wrong, or None."""
        found = {int(key.rpartition("/")[2]): sign for key, sign in signs.items()}
        states = set()
        for process, last in enumerate(self._last):
            sign = found.get(process, last)
            known = json.loads(sign) if sign else {"name": f"process {process}", "state": "alive"}
            states.add(known["state"])
            if sign != last or known["state"] == "done":
                self._last[process], self._silent[process] = sign, Clock()
            if self._silent[process].tick() > LOST:
                return lost(known["name"])
        if "failed" in states and "alive" not in states:
            return "all processes failed, each for the reason in its log"
        return None


def lost(who: str) -> str:
    return (
        f"{who} was lost: no sign of life for {LOST:.0f} s, so it was killed or stopped, or its "
        "machine or network is gone"
    )


def within(seconds: float, function: Callable):
    """What `function` returns; None if it fails, or takes longer and then goes on unheeded."""
    result = []

    def call() -> None:
        with contextlib.suppress(Exception):
            result.append(function())

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    return result[0] if result else None
