"""The loop around the step: compiles once, stops on a bad loss, resumes, keeps, writes."""

import json
import logging
import math
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from elastictok_jax import cli
from elastictok_jax.config import apply_overrides, read_config
from elastictok_jax.data import media
from elastictok_jax.data.sources.file_source import EMBEDDED
from elastictok_jax.data.sources.splits import open_splits
from elastictok_jax.errors import UsageError
from elastictok_jax.experiment_registry import get_experiment
from elastictok_jax.tokenizer.api import ElasticTokenizer
from elastictok_jax.training.loop import train_experiment
from elastictok_jax.training.metric_writers import MetricWriter, read_metrics

pytestmark = pytest.mark.xdist_group("loop")  # one worker makes what they share

OPTIONS = {
    "model.width": 16,
    "model.mlp_width": 32,
    "model.encoder_layers": 1,
    "model.decoder_layers": 1,
    "model.heads": 1,
    "video.resolution": 16,
    "masking.min_tokens": 1,
    "loss.lpips_weight": 0.0,
    "optimizer.warmup_steps": 2,
    "optimizer.schedule": "constant",
    "optimizer.ema_decay": 0.9,
    "train.steps": 6,
    "train.log_every": 2,
    "train.eval_every": 3,
    "train.checkpoint_every": 2,
    "data.batch_size": 2 * jax.device_count(),
    "data.sequence_blocks": 2,
    "evaluation.batches": 1,
    "evaluation.report": False,
}


def tiny(options: dict | None = None):
    config = get_experiment("quickstart")
    apply_overrides(config, OPTIONS | (options or {}))
    return config


def checkpoint_steps(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def compilations(caplog, name: str) -> int:
    return sum(f"Compiling jit({name})" in record.getMessage() for record in caplog.records)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of 6 steps with TensorBoard on, and its log of compilations beside it."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("jax")
    logger.addHandler(handler)
    try:
        with jax.log_compiles():
            assert train_experiment(tiny({"train.tensorboard": True}), workdir=workdir)
    finally:
        logger.removeHandler(handler)
    (workdir.parent / "compilations.json").write_text(json.dumps(records))
    return workdir


@pytest.fixture
def workdir(finished, tmp_path) -> Path:
    """A copy of the finished run, to be changed."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def test_step_and_evaluation_compile_once(finished):
    records = json.loads((finished.parent / "compilations.json").read_text())
    for name in ("train_step", "evaluate"):
        assert sum(f"Compiling jit({name})" in record for record in records) == 1


def test_resumed_run_compiles_once_and_logs_each_step_once(workdir, caplog):
    config = tiny({"train.steps": 10})
    with jax.log_compiles(), caplog.at_level(logging.WARNING, logger="jax"):
        assert train_experiment(config, workdir=workdir)
    assert compilations(caplog, "train_step") == 1
    assert compilations(caplog, "evaluate") == 1
    lines = read_metrics(workdir / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6, 8, 10]
    assert [line["step"] for line in lines if "eval/mse" in line] == [0, 3, 6, 9, 10]
    for line in lines:
        assert 0 <= line.get("wait_fraction", 0) <= 1
    # What the run ends with is what is on disk.
    assert read_config(workdir / "config.json").train.steps == 10
    assert checkpoint_steps(workdir)[-1] == 10


def test_finished_run_is_left_as_it_is(workdir):
    before = (workdir / "metrics.jsonl").read_text()
    assert train_experiment(tiny(), workdir=workdir)
    assert (workdir / "metrics.jsonl").read_text() == before
    assert checkpoint_steps(workdir)[-1] == 6


def test_non_finite_loss_stops_and_keeps_what_was_good(workdir, capsys):
    worse = {"optimizer.learning_rate": 1e30, "train.steps": 50}
    words = [f"--config.{key}={value}" for key, value in (OPTIONS | worse).items()]
    assert cli.main(["train", "quickstart", "--workdir", str(workdir), *words]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    pattern = r"elastictok: error: loss is (\S+) with gradient norm (\S+) at step (\d+): stopped\. "
    found = re.match(pattern, last)
    assert found, last
    assert not all(math.isfinite(float(number)) for number in found.groups()[:2])
    step = int(found[3])
    assert 6 < step <= 10
    assert checkpoint_steps(workdir)[-1] < step
    assert str(workdir / "checkpoints") in last
    assert "--config.optimizer.learning_rate lower" in last
    assert "--config.seed" in last

    # The checkpoint from before is whole: it loads, and the advice works.
    ElasticTokenizer.from_pretrained(workdir)
    newest = checkpoint_steps(workdir)[-1]
    assert train_experiment(tiny({"train.steps": newest + 2}), workdir=workdir)
    assert f"resuming at step {newest}:" in capsys.readouterr().err


def test_resume_with_another_model_is_refused(workdir):
    before = (workdir / "config.json").read_text()
    with pytest.raises(UsageError) as error:
        train_experiment(tiny({"model.width": 32}), workdir=workdir)
    message = str(error.value)
    assert "model.width 16 -> 32" in message
    assert "another --workdir" in message
    assert "model.mlp_width" not in message  # only what differs is named
    assert (workdir / "config.json").read_text() == before


def test_keeps_the_newest_and_the_best(workdir):
    # From step 6 on, a learning rate that wrecks the model: the best stays an early one.
    wrecking = {"train.steps": 14, "train.eval_every": 2, "optimizer.learning_rate": 10.0}
    assert checkpoint_steps(workdir) == [4, 6]
    assert train_experiment(tiny(wrecking), workdir=workdir)
    lines = read_metrics(workdir / "metrics.jsonl")
    errors = {line["step"]: line["eval/mse"] for line in lines if "eval/mse" in line}
    assert errors.keys() == {0, 3, 6, 8, 10, 12, 14}
    assert errors[6] < min(errors[step] for step in (8, 10, 12, 14)), "nothing was wrecked"
    assert checkpoint_steps(workdir) == [6, 12, 14]


def test_runs_with_nothing_held_out(tmp_path):
    options = {"data.sources.main.path": str(EMBEDDED / "train"), "data.eval_fraction": 0.0}
    assert train_experiment(tiny(options), workdir=tmp_path / "run")
    assert checkpoint_steps(tmp_path / "run") == [4, 6]
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [2, 4, 6]


def test_metrics_are_cut_back_to_the_restored_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": step, "loss": 1.0 / (step + 1)} for step in range(1, 6)]
    whole = [json.dumps(line) + "\n" for line in lines]
    path.write_text("".join(whole) + '{"step": 6, "lo')  # the kill came in the middle of a line
    assert read_metrics(path) == lines
    writer = MetricWriter(tmp_path, tiny(), start_step=3)
    writer.scalars(4, {"loss": 0.5})
    writer.close()
    assert path.read_text() == "".join(whole[:3]) + '{"step": 4, "loss": 0.5}\n'


def test_resume_without_a_checkpoint_starts_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "eval/mse": 1.0}\n{"step": 1, "loss": 1.0}\n')
    MetricWriter(tmp_path, tiny(), start_step=0).close()
    assert [line["step"] for line in read_metrics(path)] == [0]


def test_tensorboard_has_the_same_scalars_and_a_picture(finished):
    scalars, pictures = {}, []
    (events,) = (finished / "tensorboard").iterdir()
    for event in read_events(events):
        for value in event.summary.value:
            if value.HasField("simple_value"):
                scalars[event.step, value.tag] = value.simple_value
            if value.HasField("image"):
                pictures.append((event.step, value.tag, value.image))
    lines = read_metrics(finished / "metrics.jsonl")
    expected = {
        (line["step"], key): value for line in lines for key, value in line.items() if key != "step"
    }
    assert scalars.keys() == expected.keys()
    for key, value in scalars.items():
        assert value == pytest.approx(expected[key], rel=1e-6)
    assert [step for step, _, _ in pictures] == [0, 3, 6]
    for _, tag, image in pictures:
        assert tag == "eval/original_and_decoded"
        rows = OPTIONS["data.batch_size"]
        assert (image.height, image.width) == (16 * rows, 16 * 4)
        assert image.encoded_image_string.startswith(b"\x89PNG")


def read_events(path: Path):
    """TensorBoard's records: length (8 bytes), checksum (4), the event, checksum (4)."""
    data = path.read_bytes()
    while data:
        size = int.from_bytes(data[:8], "little")
        event = Event()
        event.ParseFromString(data[12 : 12 + size])
        yield event
        data = data[16 + size :]


def test_a_file_that_is_damaged_while_training_is_replaced_and_counted(tmp_path, capsys):
    """Frames in its middle cannot be decoded: opening the file shows nothing of it."""
    folder = tmp_path / "data"
    folder.mkdir()
    for path in sorted((EMBEDDED / "train").glob("photo_*.jpg"))[:12]:
        shutil.copy(path, folder)
    frames = media.read_frames(EMBEDDED / "heldout" / "bbb_kite.mp4", count=64, side=32)
    media.write_video(folder / "clip.mp4", frames, fps=24)
    data = bytearray((folder / "clip.mp4").read_bytes())
    middle = len(data) * 4 // 10
    data[middle : middle + 400] = np.random.default_rng(0).bytes(400)
    (folder / "clip.mp4").write_bytes(data)
    options = {"data.sources.main.path": str(folder), "data.eval_fraction": 0.0}
    options |= {"data.cache_mib": 0, "data.max_bad_fraction": 0.5, "train.steps": 12}
    assert train_experiment(tiny(options), workdir=tmp_path / "run")
    shown = capsys.readouterr().err
    assert shown.count("replaced: ") >= 1 and "clip.mp4" in shown
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert lines[-1]["replaced_blocks"] > 0


def test_counts_of_damage_go_on_when_a_run_resumes(tmp_path, monkeypatch):
    source = type(open_splits(tiny()).train[0].source)
    read = source.read

    def every_third_damaged(self, item, indices, *, side):
        if item % 3 == 0:
            raise media.MediaError(f"item {item} is damaged")
        return read(self, item, indices, side=side)

    monkeypatch.setattr(source, "read", every_third_damaged)
    counts = []
    for name, ends in (("straight", [4]), ("resumed", [2, 4])):
        for steps in ends:
            options = {"data.max_bad_fraction": 0.9, "train.log_every": 1, "train.steps": steps}
            assert train_experiment(tiny(options), workdir=tmp_path / name)
        lines = read_metrics(tmp_path / name / "metrics.jsonl")
        counts.append([line.get("replaced_blocks", 0) for line in lines if "loss" in line])
    assert counts[0] == counts[1] and 0 < counts[0][1] < counts[0][3], counts
