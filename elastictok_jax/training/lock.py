"""Locks a workdir to one run at a time, also if several machines share the storage.

The lock is a file that is created only if it does not exist, which is atomic on network file
systems too. It names its holder, which touches it every BEAT seconds. A lock whose holder has died
on this machine is taken over at once; a lock of another machine, once it has not been touched for
STALE seconds by this machine's clock.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from elastictok_jax.errors import RunError, UsageError

LOCK = "lock.json"
BEAT = 5.0  # seconds between touches
STALE = 45.0  # seconds without a touch until the holder counts as dead


class WorkdirLock:
    """Holds the lock of `workdir`, which is created if it does not exist, until closed.

    Raises:
      UsageError: if another process holds it, naming host, process and time; or if it cannot be
        written.
    """

    def __init__(self, workdir: Path):
        self._path = workdir / LOCK
        self._token = uuid.uuid4().hex
        self._lost = ""
        self._is_new = not workdir.exists()
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            self._take()
        except OSError as error:
            raise UsageError(
                f"workdir {workdir} cannot be written ({error.strerror}): choose a writable "
                "--workdir"
            ) from None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="workdir lock", daemon=True)
        self._thread.start()

    def raise_if_lost(self) -> None:
        """Raises RunError if another process has taken the lock, as after a long freeze."""
        if self._lost:
            raise RunError(
                f"{self._path.parent} was taken over by {self._lost} while this process did not "
                "run: only that one goes on"
            )

    def close(self) -> None:
        """Releases the lock; removes the workdir if it was created for the lock and is empty."""
        self._closed.set()
        self._thread.join()
        if self._is_ours():
            self._path.unlink(missing_ok=True)
        if self._is_new:
            with contextlib.suppress(OSError):  # not empty: there is a run in it
                self._path.parent.rmdir()

    def _take(self) -> None:
        while not self._make():
            holder = _read(self._path)
            if holder is None:
                continue  # released in the meantime
            if not _has_died(holder) and _lives(self._path, holder):
                raise UsageError(
                    f"workdir {self._path.parent} is in use by {_who(holder)}: wait for it, stop "
                    "it, or choose another --workdir"
                )
            self._remove(holder)

    def _make(self) -> bool:
        """Creates the lock together with its content; returns False if there is one already."""
        mine = self._path.with_name(f".{LOCK}.{self._token}")
        content = {"token": self._token, "since": time.strftime("%Y-%m-%d %H:%M:%S")} | _identity()
        mine.write_text(json.dumps(content))
        try:
            os.link(mine, self._path)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            try:
                with open(self._path, "x") as file:
                    file.write(json.dumps(content))
            except FileExistsError:
                return False
        finally:
            mine.unlink()
        return True

    def _remove(self, holder: dict[str, Any]) -> None:
        """Removes the lock of a dead holder; if several processes try, only one succeeds."""
        stale = self._path.with_name(f".{LOCK}.{self._token}.stale")
        try:
            os.rename(self._path, stale)
        except FileNotFoundError:
            return
        if _read(stale) != holder:  # another process was faster, and this is its lock
            with contextlib.suppress(OSError):
                os.link(stale, self._path)
        stale.unlink()

    def _keep(self) -> None:
        while not self._closed.wait(BEAT):
            with contextlib.suppress(OSError):
                if self._is_ours():
                    os.utime(self._path)
                elif holder := _read(self._path):
                    self._lost = _who(holder)

    def _is_ours(self) -> bool:
        holder = _read(self._path)
        return holder is not None and holder.get("token") == self._token


def _identity() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "pid": pid,
        "started": _started(pid),
        "machine": _first_line("/proc/sys/kernel/random/boot_id") + _namespace(),
    }


def _read(path: Path) -> dict[str, Any] | None:
    """Returns the content of a lock, {} if it is damaged, or None if there is no lock."""
    try:
        holder = json.loads(path.read_bytes())
        return holder if isinstance(holder, dict) else {}
    except ValueError:
        return {}
    except FileNotFoundError:
        return None


def _has_died(holder: dict[str, Any]) -> bool:
    """Returns whether the holder was a process of this machine that no longer exists."""
    here = _identity()
    if not here["machine"] or holder.get("machine") != here["machine"]:
        return False
    pid, started = holder.get("pid"), holder.get("started")
    return not isinstance(pid, int) or not started or _started(pid) != started


def _lives(path: Path, holder: dict[str, Any]) -> bool:
    """Returns whether the lock is touched within STALE seconds; True at once on this machine."""
    if holder.get("machine") == _identity()["machine"] != "":
        return True

    def state() -> tuple[float, Any]:
        try:
            return path.stat().st_mtime_ns, _read(path)
        except OSError:
            return 0, None

    print(
        f"waiting up to {STALE:.0f} s for a sign of life of {_who(holder)}, which holds {path}",
        file=sys.stderr,
        flush=True,
    )
    before, deadline = state(), time.monotonic() + STALE
    while time.monotonic() < deadline:
        time.sleep(1.0)
        now = state()
        if now[1] is None:
            return False
        if now != before:
            return True
    return False


def _who(holder: dict[str, Any]) -> str:
    return (
        f"process {holder.get('pid', '?')} on {holder.get('host', 'an unknown host')} since "
        f"{holder.get('since', 'an unknown time')}"
    )


def _started(pid: int) -> str:
    """Returns when a process started, in clock ticks since boot; "" if it does not exist."""
    stat = _first_line(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return stat[19] if len(stat) > 19 and stat[0] not in "ZX" else ""


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _first_line(path: str) -> str:
    try:
        with open(path, errors="replace") as file:
            return file.readline().strip()
    except OSError:
        return ""
