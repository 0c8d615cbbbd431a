"""How process 0 judges the heartbeats of the others."""

import json

from elastictok_jax.parallel import liveness
from elastictok_jax.parallel.liveness import Heartbeats, result_within


def sign(process, state, at=0):
    name = f"process {process} of 2 (host)"
    return {f"signs/{process}": json.dumps({"name": name, "state": state, "at": at})}


def test_a_silent_process_is_lost_and_one_that_is_done_is_not(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(liveness.time, "monotonic", lambda: now[0])
    signs = Heartbeats(2)
    wrong = []
    for second in range(40):
        now[0] = float(second)
        wrong.append(signs.read(sign(0, "alive", second) | sign(1, "alive")))
        if wrong[-1]:
            break
    assert wrong[-1].startswith("process 1 of 2 (host) was lost: no sign of life for 30 s")
    assert 30 <= second <= 33

    now[0], signs = 0.0, Heartbeats(2)
    for second in range(100):
        now[0] = float(second)
        assert signs.read(sign(0, "alive", second) | sign(1, "done")) is None


def test_time_in_which_process_0_was_itself_stopped_does_not_count(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(liveness.time, "monotonic", lambda: now[0])
    signs = Heartbeats(2)
    assert signs.read(sign(0, "alive") | sign(1, "alive")) is None
    now[0] = 1000.0
    assert signs.read(sign(0, "alive", 1) | sign(1, "alive")) is None


def test_when_all_have_failed_none_is_waited_for():
    signs = Heartbeats(2)
    assert signs.read(sign(0, "failed") | sign(1, "alive")) is None
    assert "all processes failed" in signs.read(sign(0, "failed") | sign(1, "failed"))


def test_what_hangs_or_fails_is_not_waited_for():
    assert result_within(10, lambda: 3) == 3
    assert result_within(10, lambda: 1 / 0) is None
    assert result_within(0.05, lambda: liveness.time.sleep(5)) is None
