"""One run in a workdir at a time: who holds it is named, and the dead hold nothing."""

import json
import os
import subprocess
import sys
import time

import pytest

from elastictok_jax.errors import RunError, UsageError
from elastictok_jax.training import lock
from elastictok_jax.training.lock import LOCK, WorkdirLock


def holder(workdir):
    return json.loads((workdir / LOCK).read_text())


def test_a_second_run_is_refused_and_told_by_whom(tmp_path):
    first = WorkdirLock(tmp_path / "run")
    with pytest.raises(UsageError, match=rf"in use by process {os.getpid()} on .* since 20"):
        WorkdirLock(tmp_path / "run")
    first.close()
    assert not (tmp_path / "run").exists()  # it was made for the lock
    WorkdirLock(tmp_path / "run").close()


def test_the_lock_of_a_killed_process_is_taken_over_at_once(tmp_path):
    program = (
        "import os, sys, pathlib; from elastictok_jax.training.lock import WorkdirLock\n"
        "WorkdirLock(pathlib.Path(sys.argv[1])); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", program, os.fspath(tmp_path)], check=False)
    dead = holder(tmp_path)
    started = time.monotonic()
    held = WorkdirLock(tmp_path)
    assert time.monotonic() - started < lock.STALE
    assert holder(tmp_path)["token"] != dead["token"]
    held.close()


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The lock of a process on another machine."""
    monkeypatch.setattr(lock, "STALE", 3.0)
    content = {"token": "other", "host": "node7", "pid": 1, "machine": "x", "started": "5"}
    (tmp_path / LOCK).write_text(json.dumps(content))
    return tmp_path


def test_a_machine_that_gives_no_sign_loses_the_lock(elsewhere, capsys):
    WorkdirLock(elsewhere).close()
    assert not (elsewhere / LOCK).exists()
    assert "sign of life of process 1 on node7" in capsys.readouterr().err


def test_a_machine_that_gives_signs_keeps_the_lock(elsewhere):
    touch = "import os, sys, time\nfor _ in range(40): os.utime(sys.argv[1]); time.sleep(0.2)"
    beats = subprocess.Popen([sys.executable, "-c", touch, os.fspath(elsewhere / LOCK)])
    try:
        time.sleep(0.5)
        with pytest.raises(UsageError, match="in use by process 1 on node7"):
            WorkdirLock(elsewhere)
    finally:
        beats.kill()
        beats.wait()


def test_a_process_that_was_taken_for_dead_notices(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.05)
    held = WorkdirLock(tmp_path)
    held.raise_if_lost()
    (tmp_path / LOCK).write_text(json.dumps({"token": "b", "host": "node8", "pid": 3}))
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not held._lost:
        time.sleep(0.05)
    with pytest.raises(RunError, match="taken over by process 3 on node8"):
        held.raise_if_lost()
    held.close()
    assert holder(tmp_path)["host"] == "node8"


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff"])
def test_a_damaged_lock_is_watched_like_one_from_elsewhere(content, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "STALE", 1.5)
    (tmp_path / LOCK).write_bytes(content)
    held = WorkdirLock(tmp_path)
    assert holder(tmp_path)["pid"] == os.getpid()
    held.close()
    assert not (tmp_path / LOCK).exists()


def test_a_workdir_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        WorkdirLock(tmp_path / "file" / "run")
