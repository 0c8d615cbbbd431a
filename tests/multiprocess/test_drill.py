"""The drill: of four processes one is asked to stop, killed or frozen; the others end in time, say
why, and the run goes on from its last checkpoint as if nothing had been."""

import signal

import numpy as np
import pytest

from elastictok_jax.errors import STOPPED
from elastictok_jax.training.metric_writers import read_metrics
from tests.multiprocess.launched import Processes, saved_steps
from tests.training.test_resume import TIMINGS, final_state

pytestmark = pytest.mark.slow
STEPS, SAVED_EVERY = 60, 10
OPTIONS = {
    "model.bottleneck": "vae",
    "optimizer.ema_decay": 0.9,
    "train.steps": STEPS,
    "train.eval_every": 20,
    "train.checkpoint_every": SAVED_EVERY,
    "train.keep_last": 100,
    "evaluation.report": "false",
    "mesh.fsdp": 2,
}
IN_TIME = 60.0  # seconds in which all that is left has to end


def finish(workdir, *, processes):
    with Processes(workdir, processes=processes, devices=4 // processes, options=OPTIONS) as run:
        assert run.wait() == [0] * processes, run.report
        assert run.lines(0)[-1] == (f"finished at step {STEPS}: step {STEPS} is saved in {workdir}")
        return run.text(0)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(workdir, processes=4)
    return workdir


def metrics(workdir):
    lines = read_metrics(workdir / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if "eval/mse" in line] == [0, 20, 40, 60]
    return [{key: line[key] for key in line if key not in TIMINGS} for line in lines]


def assert_bitwise_the_same(workdir, undisturbed):
    assert metrics(workdir) == metrics(undisturbed)
    state, position = final_state(workdir)
    expected, expected_position = final_state(undisturbed)
    assert position == expected_position and state.keys() == expected.keys()
    assert [name for name in state if state[name].tobytes() != expected[name].tobytes()] == []


def disturbed(workdir, *, victim, number):
    """Disturbs one process of a new run; returns what ended, with what each said."""
    run = Processes(workdir, processes=4, options=OPTIONS)
    with run:
        run.until(lambda: bool(saved_steps(workdir)) and run.steps_logged() >= SAVED_EVERY + 3)
        run.signal(victim, number)
        stops = number == signal.SIGTERM
        codes = run.wait(seconds=IN_TIME, but=None if stops else victim)
        assert codes == ([STOPPED] * 4 if stops else [1] * 3), run.report
    return run


def test_one_is_asked_to_stop(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    run = disturbed(workdir, victim=3, number=signal.SIGTERM)
    stopped = saved_steps(workdir)[-1]
    assert SAVED_EVERY < stopped < STEPS
    assert run.lines(0)[-1] == f"stopped at step {stopped}: step {stopped} is saved in {workdir}"
    assert f"resuming at step {stopped}:" in finish(workdir, processes=4)
    assert_bitwise_the_same(workdir, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("victim", [0, 2])
def test_one_is_lost(undisturbed, tmp_path, victim, number):
    workdir = tmp_path / "run"
    run = disturbed(workdir, victim=victim, number=number)
    saved = saved_steps(workdir)[-1]
    assert saved < STEPS
    for process in {0, 1, 2, 3} - {victim}:
        last = run.lines(process)[-1]
        assert last.startswith(f"elastictok: error: process {victim} of 4 ("), run.report
        assert " was lost: " in last
        assert last.endswith(
            f"Step {saved} is the newest saved in {workdir}: run the same command again in every "
            "process to go on from it"
        )
    assert f"resuming at step {saved}:" in finish(workdir, processes=4)
    assert_bitwise_the_same(workdir, undisturbed)


def test_goes_on_with_half_the_processes(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    disturbed(workdir, victim=1, number=signal.SIGKILL)
    saved = saved_steps(workdir)[-1]
    assert f"resuming at step {saved}:" in finish(workdir, processes=2)
    found, expected = metrics(workdir), metrics(undisturbed)
    for line, other in zip(found, expected, strict=True):
        key = "loss" if "loss" in line else "eval/mse"
        np.testing.assert_allclose(line[key], other[key], rtol=1e-4, err_msg=str(line["step"]))
        assert line.get("kept_fraction") == other.get("kept_fraction")  # the same masks
