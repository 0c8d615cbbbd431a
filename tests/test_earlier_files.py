"""Workdirs, configs, tokens and routers of earlier versions still load, resume and decode."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from elastictok_jax import ElasticTokenizer, Tokens
from elastictok_jax.config import apply_overrides, read_config
from elastictok_jax.data import media
from elastictok_jax.data.sources.file_source import EMBEDDED
from elastictok_jax.training.loop import train_experiment
from elastictok_jax.training.metric_writers import read_metrics

V0 = Path(__file__).parent / "fixtures" / "v0"
EXPECTED = json.loads((V0 / "expected.json").read_text())


@pytest.fixture
def workdir(tmp_path):
    shutil.copytree(V0 / "run", tmp_path / "run")
    return tmp_path / "run"


def test_a_config_has_its_keys_where_they_moved():
    config = read_config(V0 / "run" / "config.json")
    before = json.loads((V0 / "run" / "config.json").read_text())
    assert config.compute.dtype == before["model"]["dtype"] == "float32"
    assert config.compute.remat == before["model"]["remat"] == "none"
    assert "dtype" not in config.model
    assert config.model.family == "elastictok"
    assert config.model.width == before["model"]["width"] == 16


def test_a_run_resumes_with_the_losses_it_would_have_had(workdir):
    config = read_config(workdir / "config.json")
    apply_overrides(config, {"train.steps": 4})
    assert train_experiment(config, workdir=workdir)
    losses = {x["step"]: x["loss"] for x in read_metrics(workdir / "metrics.jsonl") if "loss" in x}
    assert losses == pytest.approx({int(k): v for k, v in EXPECTED["loss"].items()}, rel=1e-5)


def test_tokens_decode_to_the_same_frames(workdir):
    tokenizer = ElasticTokenizer.from_pretrained(workdir)
    assert tokenizer.fingerprint == EXPECTED["fingerprint"]
    tokens = Tokens.load(V0 / "kite.etok")
    with np.load(V0 / "decoded.npz") as before:
        np.testing.assert_array_equal(tokens.lengths, before["lengths"])
        np.testing.assert_array_equal(tokens.mse, before["mse"])
        frames = tokenizer.decode(tokens)[::4].astype(int)
        # Equal to the last bit on the machine that wrote them; others round elsewhere.
        assert np.abs(frames - before["frames"]).max() <= 1


def test_a_router_is_read_and_used(workdir):
    tokenizer = ElasticTokenizer.from_pretrained(workdir)
    assert tokenizer.router is not None and tokenizer.router.digest == EXPECTED["router"]
    clip = media.read_frames(EMBEDDED / "heldout" / "bbb_kite.mp4", count=4)
    tokens = tokenizer.encode(clip, max_mse=0.6, search="regression")
    assert set(tokens.lengths.tolist()) == {9}
