"""A run that is killed, stopped or interrupted ends up exactly where an undisturbed one does."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from elastictok_jax.config import read_config
from elastictok_jax.errors import STOPPED
from elastictok_jax.parallel.mesh import AXES
from elastictok_jax.storage.checkpoint import Checkpointer
from elastictok_jax.training.metric_writers import read_metrics
from tests.tiny import abstract_state

pytestmark = pytest.mark.xdist_group("resume")  # one worker makes what they share

STEPS, EVAL_EVERY = 60, 20
OPTIONS = {
    "model.width": 16,
    "model.mlp_width": 32,
    "model.encoder_layers": 1,
    "model.decoder_layers": 1,
    "model.heads": 1,
    "video.resolution": 16,
    "masking.min_tokens": 1,
    "loss.lpips_weight": 0,
    "optimizer.warmup_steps": 5,
    "optimizer.ema_decay": 0.9,
    "train.steps": STEPS,
    "train.log_every": 1,
    "train.eval_every": EVAL_EVERY,
    "train.checkpoint_every": 10,
    "data.batch_size": 2,
    "data.sequence_blocks": 2,
    "evaluation.batches": 1,
    "evaluation.report": "false",
}
TIMINGS = {
    "eval/seconds",
    "step_seconds",
    "tokens_per_second",
    "model_flop_utilisation",
    "wait_fraction",
}
LIMIT = 300  # seconds that anything may take before the test gives up


class Run:
    """`python -m elastictok_jax train` in a process of its own, its stderr in a file."""

    def __init__(self, workdir: Path, **options):
        self.checkpoints = workdir / "checkpoints"
        self.log = workdir.with_suffix(".log")
        words = [f"--config.{key}={value}" for key, value in (OPTIONS | options).items()]
        env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
        env.setdefault("JAX_COMPILATION_CACHE_DIR", str(workdir.parent / "compiled"))
        command = [sys.executable, "-m", "elastictok_jax", "train", "quickstart"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, "--workdir", str(workdir), *words], stderr=log, env=env
            )

    @property
    def text(self) -> str:
        return self.log.read_text()

    @property
    def steps_logged(self) -> int:
        return len(re.findall(r"^step \d+/\d+  .*\bloss ", self.text, flags=re.M))

    def wait(self) -> int:
        try:
            return self.process.wait(LIMIT)
        finally:
            self.process.kill()

    def until(self, condition: Callable[[], bool]) -> None:
        """Returns as soon as `condition` holds; the process has to be alive till then."""
        deadline = time.monotonic() + LIMIT
        while not condition():
            assert self.process.poll() is None, f"ended too soon:\n{self.text}"
            if time.monotonic() > deadline:
                self.process.kill()
                pytest.fail(f"waited too long:\n{self.text}")
            time.sleep(0.0005)

    def handles_sigterm(self) -> bool:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        caught = int(re.search(r"^SigCgt:\s*(\w+)", status, flags=re.M)[1], 16)
        return bool(caught >> (signal.SIGTERM - 1) & 1)


def whole(checkpoints: Path) -> list[int]:
    return sorted(int(path.name) for path in checkpoints.glob("*") if path.name.isdigit())


def temporary(checkpoints: Path) -> list[str]:
    return [path.name for path in checkpoints.glob("*tmp*")]


def final_state(workdir: Path):
    """Named leaves of the newest checkpoint, and its data position."""
    config = read_config(workdir / "config.json")
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), AXES)
    checkpoints = Checkpointer(workdir, keep_last=2, keep_best=1)
    try:
        assert checkpoints.latest_step() == STEPS
        state, position = checkpoints.restore(STEPS, abstract_state(config, mesh))
    finally:
        checkpoints.close()
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}, position


def assert_same_run(workdir: Path, undisturbed: Path) -> None:
    state, position = final_state(workdir)
    expected, expected_position = final_state(undisturbed)
    assert position == expected_position
    assert state.keys() == expected.keys()
    for part in (".params", ".opt_state", ".ema_params"):
        assert any(name.startswith(part) for name in state), f"no {part} to compare"
    unequal = [name for name in state if state[name].tobytes() != expected[name].tobytes()]
    assert not unequal

    lines, expected_lines = (
        [{key: line[key] for key in line if key not in TIMINGS} for line in read_metrics(path)]
        for path in (workdir / "metrics.jsonl", undisturbed / "metrics.jsonl")
    )
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
    evals = [line["step"] for line in lines if "eval/mse" in line]
    assert evals == list(range(0, STEPS + 1, EVAL_EVERY))
    assert lines == expected_lines


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    run = Run(workdir)
    assert run.wait() == 0, run.text
    assert (
        run.text.splitlines()[-1] == f"finished at step {STEPS}: step {STEPS} is saved in {workdir}"
    )
    state, position = final_state(workdir)
    assert position["next_row"] == STEPS * OPTIONS["data.batch_size"]
    moved = [name for name in state if (state[name] != 0).any()]
    assert any(name.startswith(".ema_params") for name in moved)
    return workdir


def test_killed_in_the_middle_of_a_save(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    for _ in range(5):  # again at the next save where the kill came too late
        run = Run(workdir)
        run.until(lambda: bool(whole(run.checkpoints) and temporary(run.checkpoints)))  # noqa: B023
        run.process.send_signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
        left = temporary(run.checkpoints)
        if left:
            break
    assert left, "no kill fell into a save"
    kept = whole(run.checkpoints)[-1]
    assert kept < STEPS

    run = Run(workdir)
    assert run.wait() == 0, run.text
    assert f"resuming at step {kept}:" in run.text
    assert not temporary(run.checkpoints)
    assert_same_run(workdir, undisturbed)


def test_sigterm_saves_stops_and_goes_on(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    run = Run(workdir)
    run.until(lambda: run.steps_logged >= 13)
    run.process.send_signal(signal.SIGTERM)
    assert run.wait() == STOPPED, run.text
    stopped = int(
        re.search(r"^stopped at step (\d+): step \1 is saved in", run.text, flags=re.M)[1]
    )
    assert 13 <= stopped < STEPS
    assert whole(run.checkpoints)[-1] == stopped
    assert read_metrics(workdir / "metrics.jsonl")[-1]["step"] == stopped
    assert "SIGTERM: saving, then stopping" in run.text
    assert "Traceback" not in run.text

    run = Run(workdir)
    assert run.wait() == 0, run.text
    assert f"resuming at step {stopped}:" in run.text
    assert_same_run(workdir, undisturbed)


def test_ctrl_c_saves_and_exits_well(tmp_path):
    run = Run(tmp_path / "run")
    run.until(lambda: run.steps_logged >= 3)
    run.process.send_signal(signal.SIGINT)
    assert run.wait() == STOPPED, run.text
    stopped = int(
        re.search(r"^stopped at step (\d+): step \1 is saved in", run.text, flags=re.M)[1]
    )
    assert whole(run.checkpoints)[-1] == stopped
    meta = json.loads((run.checkpoints / str(stopped) / "meta" / "metadata").read_text())
    assert meta["config"]["train"]["steps"] == STEPS
    assert "Traceback" not in run.text


def test_second_sigterm_exits_at_once(tmp_path):
    # The first comes as soon as it is caught: before the first evaluation is even compiled.
    run = Run(tmp_path / "run", **{"evaluation.batches": 8})
    run.until(run.handles_sigterm)
    run.process.send_signal(signal.SIGTERM)
    run.until(lambda: "SIGTERM: saving, then stopping" in run.text)
    run.process.send_signal(signal.SIGTERM)
    assert run.wait() == 128 + signal.SIGTERM, run.text
    assert run.text.splitlines()[-1] == "second SIGTERM: exiting at once"
    assert not whole(run.checkpoints)
