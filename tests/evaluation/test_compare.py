"""Runs beside each other, from files as training writes them."""

import html
import json
import warnings

import pytest

from elastictok_jax.cli import main
from elastictok_jax.config import apply_overrides, config_to_json, resolve_config
from elastictok_jax.experiment_registry import get_experiment
from elastictok_jax.training.workdir import write_workdir_held_out


@pytest.fixture
def runs(tmp_path):
    """Two runs of a sweep over the seed."""
    for seed in (0, 1):
        folder = tmp_path / "sweep" / f"seed{seed}"
        folder.mkdir(parents=True)
        config = get_experiment("quickstart")
        apply_overrides(config, {"seed": seed})
        (folder / "config.json").write_text(config_to_json(resolve_config(config)))
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
    assert "is not a training workdir or a folder of them" in capsys.readouterr().err
    (runs / "seed0" / "metrics.jsonl").unlink()
    assert main(["compare", str(runs)]) == 2
    assert "seed0 has no metrics yet" in capsys.readouterr().err


def retrained(run, *, path: str, lines: list[dict] | None = None) -> None:
    """Makes `run` one on the data in `path`, with other metrics if given."""
    config = json.loads((run / "config.json").read_text())
    config["data"]["sources"]["main"]["path"] = path
    (run / "config.json").write_text(json.dumps(config))
    if lines is not None:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (run / "metrics.jsonl").write_text(text)


def test_runs_that_were_judged_on_other_data_are_said_to_be(runs, tmp_path, capsys):
    retrained(runs / "seed1", path="elsewhere")
    assert main(["compare", str(runs), "-o", str(tmp_path / "out"), "--json"]) == 0
    said = capsys.readouterr()
    first, second = json.loads(said.out)
    assert first["held_out"] != second["held_out"]
    note = f"held_out: {first['held_out']}: seed0; {second['held_out']}: seed1."
    assert said.err.startswith("note: The runs were evaluated on different held-out data")
    assert note in said.err
    page = (tmp_path / "out" / "report.html").read_text()
    assert note in page and f"<td>{first['held_out']}</td>" in page
    assert main(["compare", str(runs)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["held_out", first["held_out"], second["held_out"]] in lines


def test_the_same_files_in_two_places_are_the_same_data(runs, capsys):
    retrained(runs / "seed1", path="elsewhere")
    for run in runs.iterdir():
        write_workdir_held_out(run, "0123")
    assert main(["compare", str(runs), "--json"]) == 0
    said = capsys.readouterr()
    assert "held_out" not in said.out and said.err == ""
    write_workdir_held_out(runs / "seed1", "4567")  # as where files were added
    assert main(["compare", str(runs), "--json"]) == 0
    assert "evaluated on different held-out data" in capsys.readouterr().err


def test_metrics_without_any_value_are_not_shown(runs, tmp_path, capsys):
    lines = [{"step": 50, "loss": 0.1, "odd": float("nan")}]
    for run in runs.iterdir():
        retrained(run, path="embedded", lines=lines)
    assert main(["compare", str(runs), "-o", str(tmp_path / "out")]) == 0
    assert "odd" not in capsys.readouterr().out
    assert "odd" not in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    "name", ["$x$", "a$b", "_hidden", "$\\frac{", "中文😀", "a\nb\x1b[1m", "n" * 200]
)
def test_any_name_of_a_run_is_in_its_plot(runs, tmp_path, name):
    (runs / "seed0").rename(runs / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main(["compare", str(runs), "-o", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "compare.png").stat().st_size > 5000
    assert html.escape(name) in (tmp_path / "out" / "report.html").read_text()


def test_runs_without_a_known_curve_have_a_table(runs, tmp_path):
    for run in runs.iterdir():
        retrained(run, path="embedded", lines=[{"step": 1, "other": 2.0}])
    assert main(["compare", str(runs), "-o", str(tmp_path / "out")]) == 0
    assert not (tmp_path / "out" / "compare.png").exists()
    assert "other" in (tmp_path / "out" / "report.html").read_text()
