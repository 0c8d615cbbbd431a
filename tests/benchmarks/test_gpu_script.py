"""benchmarks/gpu.sh end to end on tiny sizes: every step runs, and the report has its results."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/gpu.sh"


def run(folder, **environment):
    words = [str(SCRIPT), str(folder)]
    environment = os.environ | {"DRY": "1", "PYTHON": sys.executable} | environment
    return subprocess.run(
        words, env=environment, capture_output=True, text=True, timeout=900, check=False
    )


@pytest.mark.slow
def test_every_step_passes_on_tiny_sizes(tmp_path):
    done = run(tmp_path, BUDGET="800")
    report = (tmp_path / "report.md").read_text()
    lines = (tmp_path / "steps.tsv").read_text().splitlines()
    states = {name: state for name, state, _ in (line.split("\t") for line in lines)}
    assert len(states) >= 12
    assert set(states.values()) == {"passed"}, done.stdout
    assert all(f"| {name} | passed |" in report for name in states)
    for path in tmp_path.glob("train-*.json"):
        assert path.stem.removeprefix("train-") in report
        assert json.loads(path.read_text())["parts"]


def test_what_no_time_is_left_for_is_reported(tmp_path):
    done = run(tmp_path, BUDGET="0")
    assert done.returncode == 0, done.stderr
    report = (tmp_path / "report.md").read_text()
    assert report.count("skipped: no time left") >= 12


def test_a_machine_without_a_gpu_is_told_what_is_missing(tmp_path):
    """Here no python has jax on a GPU; on a machine that has, there is nothing to tell."""
    import jax

    if jax.default_backend() == "gpu":
        pytest.skip("this machine has a GPU")
    done = run(tmp_path, DRY="", JAX_PLATFORMS="cpu")
    assert done.returncode == 1
    assert "[cuda]" in (tmp_path / "report.md").read_text()
