"""Damaged or chosen checkpoints, garbage in the log, failing sinks: states to be expected."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from elastictok_jax import cli
from elastictok_jax.config import apply_overrides, config_to_json
from elastictok_jax.errors import RunError, UsageError
from elastictok_jax.evaluation.compare import compare_runs
from elastictok_jax.experiment_registry import get_experiment
from elastictok_jax.storage.checkpoint import Checkpointer, DamagedCheckpoint
from elastictok_jax.storage.references import split_reference
from elastictok_jax.tokenizer.api import ElasticTokenizer
from elastictok_jax.training.inspect_run import inspect_run, inspect_run_text
from elastictok_jax.training.loop import train_experiment
from elastictok_jax.training.metric_writers import MetricWriter, read_metrics
from tests.training.test_loop import OPTIONS

pytestmark = pytest.mark.xdist_group("damaged_state")  # one worker makes what they share

RUN = OPTIONS | {"train.checkpoint_every": 2, "train.log_every": 1, "train.eval_every": 2}
RUN |= {"train.steps": 4, "train.keep_last": 2, "train.keep_best": 1}


def tiny(**changes):
    config = get_experiment("quickstart")
    apply_overrides(config, RUN | changes)
    return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "trained"
    assert train_experiment(tiny(), workdir=workdir)
    return workdir


@pytest.fixture(scope="module")
def fingerprint_at_2(trained):
    return ElasticTokenizer.from_pretrained(trained, step=2).fingerprint


@pytest.fixture
def workdir(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def data_files(checkpoint):
    return [path for path in checkpoint.glob("state/**/d/*") if path.is_file()]


def truncate(checkpoint):
    for path in data_files(checkpoint):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])


def zero(checkpoint):
    for path in data_files(checkpoint):
        path.write_bytes(bytes(path.stat().st_size))


TEARS = {
    "truncated": truncate,
    "zeros": zero,
    "no state": lambda checkpoint: shutil.rmtree(checkpoint / "state"),
    "no manifest": lambda checkpoint: (checkpoint / "state" / "manifest.ocdbt").unlink(),
    "empty metadata": lambda checkpoint: (checkpoint / "state" / "_METADATA").write_bytes(b""),
    "metadata is text": lambda c: (c / "state" / "_METADATA").write_bytes(b'{"a": '),
    "empty folder": lambda checkpoint: (shutil.rmtree(checkpoint), checkpoint.mkdir()),
}


@pytest.mark.parametrize("tear", TEARS)
def test_the_checkpoint_before_a_damaged_one_is_used(tear, workdir, fingerprint_at_2, capfd):
    TEARS[tear](workdir / "checkpoints" / "4")
    capfd.readouterr()
    assert ElasticTokenizer.from_pretrained(workdir).fingerprint == fingerprint_at_2
    note = capfd.readouterr().err
    assert re.fullmatch(r"note: checkpoint .*/4 is damaged \(.*\): step 2 is read instead\n", note)
    with pytest.raises(DamagedCheckpoint, match="is damaged"):
        ElasticTokenizer.from_pretrained(f"{workdir}@4")
    assert train_experiment(tiny(**{"train.steps": 6}), workdir=workdir)
    told = capfd.readouterr().err
    assert "resuming at step 2" in told
    assert re.search(r"/4 is damaged .* moved to .*damaged/4-0: going on from step 2", told)
    assert "Traceback" not in told
    assert [line["step"] for line in read_metrics(workdir / "metrics.jsonl") if "loss" in line] == [
        *range(1, 7)
    ]
    assert {4, 6} <= {row["step"] for row in inspect_run(workdir)["checkpoints"]}


def test_a_lost_data_position_is_damage_for_training_alone(workdir, capfd):
    shutil.rmtree(workdir / "checkpoints" / "4" / "data")
    newest = ElasticTokenizer.from_pretrained(workdir)
    assert newest.fingerprint == ElasticTokenizer.from_pretrained(f"{workdir}@4").fingerprint
    assert train_experiment(tiny(**{"train.steps": 4}), workdir=workdir)
    assert "resuming at step 2" in capfd.readouterr().err


def test_with_no_readable_checkpoint_nothing_is_begun_anew(workdir):
    for step in ("2", "4"):
        zero(workdir / "checkpoints" / step)
    with pytest.raises(RunError, match=r"4 is damaged .*2 is damaged .*no checkpoint is left"):
        train_experiment(tiny(), workdir=workdir)
    with pytest.raises(DamagedCheckpoint):
        ElasticTokenizer.from_pretrained(workdir)
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["2", "4"]


def test_a_checkpoint_is_named_by_step_or_as_the_best(workdir, tmp_path):
    checkpoints = Checkpointer.for_reading(workdir)
    values = {step: checkpoints.metrics(step)["eval/mse"] for step in (2, 4)}
    prints = {step: ElasticTokenizer.from_pretrained(workdir, step=step) for step in (2, 4)}
    best = min(values, key=values.get)
    for reference in (f"{workdir}@best", f"{workdir}@{best}"):
        found = ElasticTokenizer.from_pretrained(reference)
        assert found.fingerprint == prints[best].fingerprint
    assert prints[2].fingerprint != prints[4].fingerprint
    with pytest.raises(UsageError, match="has no step 3: choose one of 4, 2, or best"):
        ElasticTokenizer.from_pretrained(f"{workdir}@3")
    config = tiny(**{"train.init_from": f"{workdir}@2", "train.steps": 2})
    assert train_experiment(config, workdir=tmp_path / "next")
    record = json.loads((tmp_path / "next" / "init_from.json").read_text())
    assert record["from"] == f"{workdir} at step 2"


def test_a_path_with_an_at_sign_that_exists_is_a_path(tmp_path):
    (tmp_path / "run@best").mkdir()
    assert split_reference(tmp_path / "run@best") == (tmp_path / "run@best", None)
    assert split_reference("run@best") == (split_reference("run")[0], "best")
    assert split_reference("a@b@12")[1] == 12
    assert split_reference("run@²")[1] is None
    assert split_reference("run@other")[1] is None


def test_inspect_lists_steps_values_and_damage(workdir, capsys):
    zero(workdir / "checkpoints" / "4")
    rows = inspect_run(workdir)["checkpoints"]
    assert [row["step"] for row in rows] == [4, 2]
    assert rows[0]["newest"] and not rows[1]["newest"]
    assert "is damaged" in rows[0]["damage"] and rows[1]["damage"] == ""
    assert sum(row["best"] for row in rows) == 1
    assert all(row["bytes"] > 1000 and row["value"] > 0 for row in rows)
    assert inspect_run_text(inspect_run(workdir)).count("\n") == 2
    assert cli.main(["inspect", str(workdir)]) == 0
    assert cli.main(["inspect", str(workdir), "--json"]) == 0
    assert cli.main(["inspect", str(workdir / "checkpoints")]) == 2


def test_a_failed_save_says_what_is_on_disk(workdir):
    checkpoints = Checkpointer(workdir, keep_last=2, keep_best=0)
    assert "step 4 is kept" in str(checkpoints._failed(ValueError("x")))
    shutil.rmtree(workdir / "checkpoints")
    assert "there is no earlier one" in str(checkpoints._failed(ValueError("x")))


GARBAGE = [b"\xe9", b"{", b"null", b"[1]", b'"step"', b'{"loss": 1}', b'{"step": "2"}', b"\0" * 99]
GARBAGE += [b'{"step": true}', b'{"step": -1}', b"[" * 100_000]


@pytest.mark.parametrize("line", GARBAGE, ids=range(len(GARBAGE)))
def test_a_bad_line_of_the_log_costs_only_itself(line, tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    good = [{"step": step, "loss": 1.5} for step in range(1, 4)]
    lines = [json.dumps(entry).encode() for entry in good]
    path.write_bytes(b"\n".join([lines[0], line, *lines[1:], b'{"step": 4, "lo']))
    assert read_metrics(path) == good
    assert "note: 1 lines of" in capsys.readouterr().err
    MetricWriter(tmp_path, tiny(), start_step=2).close()
    assert read_metrics(path) == good[:2]


def test_values_that_are_no_numbers_are_left_out_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    values = f'"a": null, "b": [1], "c": "x", "d": true, "e": {10**400}, "f": 1e400'
    path.write_text(f'{{"step": 1, {values}, "loss": 2}}\n{{"step": {10**400}}}\n')
    assert read_metrics(path) == [{"step": 1, "f": float("inf"), "loss": 2}]
    (tmp_path / "config.json").write_text(config_to_json(tiny()))
    (row,) = compare_runs([tmp_path], output=tmp_path / "out")
    assert (row["step"], row["loss"], row["f"]) == (1, 2, None)


def test_a_line_that_follows_one_cut_off_is_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "lo{"step": 2, "loss": 0.5}\n\0\0{"step": 3}\n')
    assert read_metrics(path) == [{"step": 2, "loss": 0.5}, {"step": 3}]


def test_a_folder_for_a_log_is_refused_and_compared_as_none(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    with pytest.raises(UsageError, match="is a folder: move it away"):
        MetricWriter(tmp_path, tiny(), start_step=0)


def test_a_sink_that_fails_does_not_end_the_run(tmp_path, capsys):
    class Failing:
        """As wandb's run, when its service has died."""

        def log(self, values, step):
            raise ConnectionError("service is gone\nand more")

    writer = MetricWriter(tmp_path, tiny(), start_step=0, wandb_run=Failing())
    for step in (1, 2):
        writer.scalars(step, {"loss": 1.0})
    writer.close()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2
    assert capsys.readouterr().err.count("note: wandb failed (service is gone): metrics go on") == 1


def test_two_runs_in_one_program_and_one_folder(workdir):
    """The second comes when the first has given the folder back."""
    assert train_experiment(tiny(**{"train.steps": 5}), workdir=workdir)
    assert train_experiment(tiny(**{"train.steps": 6}), workdir=workdir)
    assert not (workdir / "lock.json").exists()


# ---- wandb itself: pip install 'elastictok_jax[wandb]'


def test_wandb_runs_offline_and_goes_on_in_the_same_run(workdir, monkeypatch, capfd):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    name = ""
    for steps in (5, 6):
        config = tiny(**{"train.steps": steps, "train.wandb_project": "x"})
        assert train_experiment(config, workdir=workdir)
        assert name in ("", (workdir / "wandb_run_id").read_text())
        name = (workdir / "wandb_run_id").read_text()
    assert len(list((workdir / "wandb").glob(f"offline-run-*-{name}"))) == 2
    assert "note: wandb failed" not in capfd.readouterr().err


def test_wandb_without_a_login_is_refused_before_data_is_read(tmp_path):
    pytest.importorskip("wandb")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    words = ["--config.train.wandb_project=x", "--config.data.sources.main.path=/absent"]
    done = subprocess.run(
        [sys.executable, "-m", "elastictok_jax", "train", "quickstart", "--workdir", "run", *words],
        check=False,
        cwd=tmp_path,
        env=environment | {"HOME": str(tmp_path), "PYTHONPATH": os.getcwd()},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert re.search(
        r"error: train.wandb_project = x: wandb does not start .*wandb login", done.stderr
    )
    assert "Traceback" not in done.stderr
