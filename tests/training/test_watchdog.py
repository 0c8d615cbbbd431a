"""The watchdog tells a hang from a long pause, and says where every thread is."""

import threading
import time

import pytest

from elastictok_jax.training.async_metrics import IN_FLIGHT
from elastictok_jax.training.watchdog import Watchdog


@pytest.fixture
def watch(tmp_path):
    """Starts watchdogs; what they say at the end is in the list that comes with each."""
    started = []

    def start(**limits):
        said = []
        dog = Watchdog(**limits, stacks=tmp_path / "stacks.txt", end=said.append)
        started.append(dog)
        return dog, said

    yield start
    for dog in started:
        dog.close()


def until(said, *, seconds=30):
    deadline = time.monotonic() + seconds
    while not said and time.monotonic() < deadline:
        time.sleep(0.05)


def test_a_pause_that_lasts_too_long_is_reported_with_all_stacks(watch, tmp_path):
    release = threading.Event()
    thread = threading.Thread(target=release.wait)
    thread.start()
    _, said = watch(step_timeout=0, pause_timeout=1)
    until(said)
    release.set()
    assert said[0] == (
        "a first step, evaluation or checkpoint has not ended for 1 s (train.pause_timeout). "
        f"The stacks of all threads are above and in {tmp_path / 'stacks.txt'}"
    )
    stacks = (tmp_path / "stacks.txt").read_text()
    assert "in until" in stacks and stacks.count("Thread 0x") >= 3


def test_steps_count_once_those_sent_off_before_them_have_ended(watch):
    dog, said = watch(step_timeout=1, pause_timeout=0)
    for _ in range(IN_FLIGHT):
        dog.step()
    time.sleep(3)
    assert not said  # peers may still compile
    dog.step()
    until(said)
    assert said[0].startswith("no step has ended for 1 s (train.step_timeout). ")


def test_zero_is_never(watch):
    dog, said = watch(step_timeout=0, pause_timeout=0)
    time.sleep(2.5)
    for _ in range(IN_FLIGHT + 1):
        dog.step()
    time.sleep(2.5)
    assert not said
