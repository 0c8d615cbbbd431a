"""The command line: light help, exit statuses, and one line that says the fix."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from elastictok_jax import cli
from elastictok_jax.config import apply_overrides, config_to_json, resolve_config
from elastictok_jax.data import media
from elastictok_jax.data.sources.file_source import EMBEDDED
from elastictok_jax.experiment_registry import get_experiment

HEAVY = ("jax", "jaxlib", "numpy", "flax", "optax", "orbax", "av", "PIL", "grain", "matplotlib")
TINY = {
    "model.width": 16,
    "model.mlp_width": 32,
    "model.encoder_layers": 1,
    "model.decoder_layers": 1,
    "model.heads": 1,
    "video.resolution": 16,
    "masking.min_tokens": 1,
    "train.steps": 1,
    "data.batch_size": jax.device_count(),
    "data.sequence_blocks": 1,
    "evaluation.batches": 1,
    "evaluation.report": "false",
}


def tiny_words(**extra) -> list[str]:
    options = TINY | {key.replace("__", "."): value for key, value in extra.items()}
    return [f"--config.{key}={value}" for key, value in options.items()]


def run(*words: str, flags: str | None = None) -> subprocess.CompletedProcess:
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    if flags:
        env["XLA_FLAGS"] = flags
    command = [sys.executable, "-m", "elastictok_jax", *words]
    return subprocess.run(
        command, capture_output=True, text=True, env=env, timeout=300, check=False
    )


@pytest.fixture
def refused(capsys):
    """Returns a function that gives the one line of a command, which must exit with status 2."""

    def check(*words) -> str:
        assert cli.main([str(word) for word in words]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        lines = captured.err.splitlines()
        assert len(lines) == 1, captured.err
        assert lines[0].startswith("elastictok: error: ")
        return lines[0]

    return check


def small_model(folder: Path) -> Path:
    """Creates a workdir with a valid config.json and nothing else."""
    config = get_experiment("quickstart")
    apply_overrides(config, TINY)
    folder.mkdir()
    (folder / "config.json").write_text(config_to_json(resolve_config(config)))
    return folder


def small_video(path: Path) -> Path:
    frames = np.random.default_rng(0).integers(0, 256, (24, 32, 48, 3), dtype=np.uint8)
    media.write_video(path, frames, fps=12)
    return path


# ---- help and listing


def test_help_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from elastictok_jax import cli\n"
        "try:\n"
        "    cli.main(['--help'])\n"
        "except SystemExit as stop:\n"
        "    assert stop.code == 0\n"
        f"heavy = sorted(set({HEAVY!r}) & set(sys.modules))\n"
        "sys.exit('imported: ' + ', '.join(heavy) if heavy else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    for verb in ("train", "evaluate", "encode", "decode", "reconstruct", "experiments"):
        assert verb in done.stdout


def test_version_as_a_module():
    done = run("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("elastictok ")


def test_experiments_lists_names(capsys):
    assert cli.main(["experiments", "--json"]) == 0
    names = json.loads(capsys.readouterr().out)
    assert "quickstart" in names and names == sorted(names)
    assert cli.main(["experiments"]) == 0
    assert capsys.readouterr().out.split() == names


# ---- usage


@pytest.mark.parametrize("words", [[], ["nosuch"], ["train", "quickstart"], ["reconstruct", "a"]])
def test_bad_usage_exits_with_2(words, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]


def test_config_option_on_a_verb_without_config(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["experiments", "--config.seed=1"])
    assert stop.value.code == 2
    assert "experiments takes no --config.KEY options" in capsys.readouterr().err


def test_options_are_told_from_words():
    words, overrides = cli.split_command_line(
        ["train", "--config.seed=1", "x", "--config.data.sources.main.path=a=b", "--workdir", "w"]
    )
    assert words == ["train", "x", "--workdir", "w"]
    assert overrides == {"seed": "1", "data.sources.main.path": "a=b"}


# ---- config


def test_unknown_experiment(refused, tmp_path):
    assert "no experiment named nosuch: registered are " in refused(
        "train", "nosuch", "--workdir", tmp_path / "run"
    )
    assert "did you mean quickstart?" in refused(
        "train", "quickstrt", "--workdir", tmp_path / "run"
    )
    assert "experiment file nosuch.py does not exist" in refused(
        "train", "nosuch.py", "--workdir", tmp_path / "run"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("train.step=3", "unknown config key train.step: did you mean train.steps?"),
        ("model.widht=3", "unknown config key model.widht: did you mean model.width?"),
        ("train.steps=many", "config key train.steps: 'many' is not int (now "),
        ("train.steps=0", "train.steps = 0: must be greater than 0"),
        ("train.steps", "--config.train.steps has no value: write --config.train.steps=VALUE"),
        ("model.bottleneck=vq", "model.bottleneck = 'vq': choose one of fsq, vae"),
        ("model.heads=5", "heads must divide width"),
        ("video.resolution=60", "as multiples of model.patch = (2, 8, 8)"),
        ("masking.min_tokens=1000", "masking.min_tokens = 1000 is more than the 128 tokens"),
        ("optimizer.accumulate_steps=3", "not a multiple of optimizer.accumulate_steps = 3"),
    ],
)
def test_bad_config_value(refused, tmp_path, option, said):
    line = refused("train", "quickstart", "--workdir", tmp_path / "run", f"--config.{option}")
    assert said in line
    assert not (tmp_path / "run").exists()


def test_batch_that_the_mesh_does_not_divide(tmp_path):
    done = run(
        *("train", "quickstart", "--workdir", str(tmp_path / "run")),
        *tiny_words(data__batch_size=6),
        flags="--xla_force_host_platform_device_count=4",
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("elastictok: error: data.batch_size = 6 ")
    assert "mesh.data x mesh.fsdp = 4; the nearest data.batch_size that fits is" in line
    nearest = int(line.split()[-1])
    assert nearest in (4, 8)
    assert not (tmp_path / "run").exists()


def test_more_devices_than_there_are(refused, tmp_path):
    asked = 2 * jax.device_count()
    words = tiny_words(mesh__data=asked, data__batch_size=asked)
    line = refused("train", "quickstart", "--workdir", tmp_path / "run", *words)
    assert f"{asked} devices are requested and {jax.device_count()} are available" in line
    assert "set one to -1" in line


# ---- data


def test_missing_and_empty_data_folders(refused, tmp_path):
    train = ("train", "quickstart", "--workdir", tmp_path / "run")
    line = refused(*train, *tiny_words(data__sources__main__path=tmp_path / "missing"))
    assert f"data folder {tmp_path / 'missing'} does not exist" in line
    (tmp_path / "empty").mkdir()
    line = refused(*train, *tiny_words(data__sources__main__path=tmp_path / "empty"))
    assert f"data folder {tmp_path / 'empty'} holds no image or video that can be read" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("share", [0.0, 0.5, 0.95])
def test_truncated_video_in_the_data(refused, tmp_path, share):
    folder = tmp_path / "data"
    folder.mkdir()
    small_video(folder / "good.mp4")
    whole = small_video(folder / "cut.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: int(share * len(whole))])
    words = tiny_words(data__sources__main__path=folder, data__eval_fraction=0)
    line = refused("train", "quickstart", "--workdir", tmp_path / "run", *words)
    assert str(folder / "cut.mp4") in line
    assert "delete it" in line
    assert not (tmp_path / "run").exists()


# ---- workdir


def test_workdir_that_cannot_be_written(refused, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for workdir in ("/proc/elastictok/run", tmp_path / "file" / "run", tmp_path / "file"):
        line = refused("train", "quickstart", "--workdir", workdir, *tiny_words())
        assert f"workdir {workdir} cannot be written" in line
        assert "choose a writable --workdir" in line
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize("garbage", [b"{not json", b"\xff\xfe\x00", b"[1, 2]", b""])
def test_workdir_with_a_damaged_config(refused, tmp_path, garbage):
    (tmp_path / "config.json").write_bytes(garbage)
    line = refused("train", "quickstart", "--workdir", tmp_path, *tiny_words())
    assert f"{tmp_path / 'config.json'} is damaged" in line
    assert "restore it from a copy" in line
    assert (tmp_path / "config.json").read_bytes() == garbage


# ---- models and inputs


def verbs_on(model, tmp_path) -> list[list]:
    (clip, *_) = sorted((EMBEDDED / "heldout").glob("*.jpg"))
    output = tmp_path / "out"
    return [
        ["evaluate", model, "-o", output],
        ["reconstruct", clip, "-o", output, "--model", model, "--max-mse", "0.01"],
        ["encode", clip, "-o", output.with_suffix(".etok"), "--model", model, "--tokens", "1"],
    ]


def test_model_that_is_missing_or_not_trained(refused, tmp_path):
    for words in verbs_on(tmp_path / "nosuch", tmp_path):
        assert f"model {tmp_path / 'nosuch'} does not exist" in refused(*words)
    (tmp_path / "bare").mkdir()
    for words in verbs_on(tmp_path / "bare", tmp_path):
        assert f"{tmp_path / 'bare' / 'config.json'} is missing" in refused(*words)
    model = small_model(tmp_path / "young")
    for words in verbs_on(model, tmp_path):
        assert f"model {model} has no checkpoints yet: train it first" in refused(*words)
    (model / "checkpoints").mkdir()
    for words in verbs_on(model, tmp_path):
        assert f"model {model} has no complete checkpoint yet: train it further" in refused(*words)
    assert not (tmp_path / "out").exists()


def test_input_that_is_no_clip(refused, tmp_path):
    model = small_model(tmp_path / "model")
    (tmp_path / "notes.txt").write_text("some words")
    (tmp_path / "words.mp4").write_text("some words")
    (tmp_path / "words.png").write_text("some words")
    reconstruct = ("-o", tmp_path / "out", "--model", model, "--max-mse", "0.01")
    assert "unknown suffix '.txt'; use one of " in refused(
        "reconstruct", tmp_path / "notes.txt", *reconstruct
    )
    for name in ("words.mp4", "words.png", "missing.mp4"):
        assert str(tmp_path / name) in refused("reconstruct", tmp_path / name, *reconstruct)
    image = tmp_path / "image.png"
    media.write_image(image, np.zeros((16, 16, 3), np.uint8))
    line = refused("reconstruct", image, *reconstruct[:-1], "0")
    assert "max_mse=0.0: give a number above 0" in line
    assert not (tmp_path / "out").exists()


def test_nothing_held_out_trains_and_is_not_evaluated(tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    shutil.copy(EMBEDDED / "heldout" / "photo_chelsea.jpg", folder)
    sizes = ["model.width=16", "model.mlp_width=16", "model.heads=1", "model.encoder_layers=1"]
    sizes += ["model.decoder_layers=1", "video.resolution=16", "masking.min_tokens=1"]
    sizes += ["data.batch_size=1", "data.sequence_blocks=1", "data.eval_fraction=0"]
    sizes += ["train.steps=2", f"data.sources.main.path={folder}", "evaluation.report=true"]
    options = [f"--config.{size}" for size in sizes]
    assert cli.main(["train", "quickstart", "--workdir", str(tmp_path / "run"), *options]) == 0
    assert not (tmp_path / "run" / "reports").exists()
    capsys.readouterr()
    assert cli.main(["evaluate", str(tmp_path / "run"), "-o", str(tmp_path / "out")]) == 2
    assert "nothing held out" in capsys.readouterr().err


def test_config_shows_every_key_with_what_it_means(capsys):
    assert (
        cli.main(["config", "quickstart", "--config.model.width=64", "--config.model.heads=1"]) == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert "model.width = 64  # features of a token between layers" in lines
    path = "a TFDS data set, a folder, a glob, embedded, synthetic"
    assert f'data.sources.main.path = "embedded"  # {path}' in lines
    assert cli.main(["config", "quickstart", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found) == len(lines) and all(of_key["doc"] for of_key in found.values())


def test_config_shows_how_two_experiments_differ(capsys):
    assert cli.main(["config", "elastictok_fsq", "--diff", "elastictok_vae"]) == 0
    assert 'model.bottleneck: "fsq" -> "vae"' in capsys.readouterr().out.splitlines()
    assert cli.main(["config", "quickstart", "--diff", "quickstart", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {}
