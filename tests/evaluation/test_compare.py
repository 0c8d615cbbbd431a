"""Runs beside each other, from files as training writes them."""

import json

import pytest

from elastictok_jax.cli import main
from elastictok_jax.config import override, resolve, to_json
from elastictok_jax.registry import get_experiment


@pytest.fixture
def runs(tmp_path):
    """Two runs of a sweep over the seed."""
    for seed in (0, 1):
        folder = tmp_path / "sweep" / f"seed{seed}"
        folder.mkdir(parents=True)
        config = get_experiment("quickstart")
        override(config, {"seed": seed})
        (folder / "config.json").write_text(to_json(resolve(config)))
        lines = [{"step": 0, "eval/mse": 0.5}, {"step": 50, "loss": 0.2 - seed / 20}]
        lines += [{"step": 100, "loss": 0.1 - seed / 20}, {"step": 100, "eval/mse": 0.3}]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "metrics.jsonl").write_text(text)
    return tmp_path / "sweep"


def test_compare_shows_what_differs_and_where_runs_ended(runs, tmp_path, capsys):
    assert main(["compare", str(runs), "-o", str(tmp_path / "out"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows == [
        {"run": "seed0", "step": 100, "seed": 0, "eval/mse": 0.3, "loss": 0.1},
        {"run": "seed1", "step": 100, "seed": 1, "eval/mse": 0.3, "loss": 0.05},
    ]
    assert json.loads((tmp_path / "out" / "compare.json").read_text()) == rows
    header = (tmp_path / "out" / "compare.csv").read_text().splitlines()[0]
    assert header == "run,step,seed,eval/mse,loss"
    assert (tmp_path / "out" / "compare.png").stat().st_size > 5000
    assert "seed1" in (tmp_path / "out" / "report.html").read_text()


def test_compare_in_columns(runs, capsys):
    assert main(["compare", str(runs / "seed1"), str(runs / "seed0")]) == 0
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.split() == ["run", "seed1", "seed0"]
    assert last.split() == ["loss", "0.05", "0.1"]


def test_what_is_no_run_is_refused(runs, tmp_path, capsys):
    assert main(["compare", str(tmp_path / "nothing")]) == 2
    assert "is no training workdir, nor a folder of such" in capsys.readouterr().err
    (runs / "seed0" / "metrics.jsonl").unlink()
    assert main(["compare", str(runs)]) == 2
    assert "seed0 has no metrics yet" in capsys.readouterr().err
