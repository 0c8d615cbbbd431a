"""Figures and pictures of a tokenizer, on real footage with a small random model."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from elastictok_jax.cli import main
from elastictok_jax.config import default_config, override, resolve, to_json
from elastictok_jax.data import media
from elastictok_jax.data.sources import EMBEDDED
from elastictok_jax.evaluation.metrics import mse, psnr
from elastictok_jax.evaluation.run import evaluate_model, reconstruct_file
from elastictok_jax.tokenizer.goal import Goal
from elastictok_jax.training.state import init_state
from elastictok_jax.weights.safetensors import save_params


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    config = default_config()
    override(
        config,
        {
            **{"model.width": 16, "model.mlp_width": 16, "model.heads": 1},
            **{"model.dtype": "float32", "model.encoder_layers": 1, "model.decoder_layers": 1},
            **{"model.patch": (2, 8, 8), "video.resolution": 16, "masking.min_tokens": 1},
            **{"data.sequence_blocks": 2, "evaluation.max_blocks": 2},
            **{"evaluation.targets": (0.5, 1.0)},
        },
    )
    config = resolve(config)
    (folder / "config.json").write_text(to_json(config))
    params = jax.device_get(init_state(config).params)
    save_params(folder / "model.safetensors", params, metadata={})
    return folder


def test_mse_and_psnr():
    black, white = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 255, np.uint8)
    assert mse(black, white) == pytest.approx(4.0)
    assert psnr(4.0) == pytest.approx(0.0)
    assert psnr(0.04) == pytest.approx(20.0)
    assert psnr(0.0) == float("inf")


def test_evaluate_writes_figures_picture_and_video(model, tmp_path):
    results = evaluate_model(model, output=tmp_path)
    assert json.loads((tmp_path / "metrics.json").read_text()) == results
    names = {path.stem for path in (EMBEDDED / "heldout").iterdir()}
    assert set(results["clips"]) == names
    for clip in results["clips"].values():
        assert [line["target_mse"] for line in clip] == [0.5, 1.0]
        for line in clip:
            assert line["tokens"] == sum(line["lengths"])
            assert line["blocks"] == len(line["lengths"]) == len(line["block_mse"])
            met = sum(error <= line["target_mse"] for error in line["block_mse"])
            assert line["blocks_met"] == met
    lengths = np.concatenate([clip[0]["lengths"] for clip in results["clips"].values()])
    assert results["targets"]["0.5"]["tokens_per_block"] == pytest.approx(lengths.mean())
    with Image.open(tmp_path / "report.png") as picture:
        assert min(picture.size) > 500
        assert np.asarray(picture.convert("L")).std() > 5  # something is drawn on it
    videos = sum(name.endswith(".mp4") for name in map(str, (EMBEDDED / "heldout").iterdir()))
    assert media.probe(tmp_path / "report.mp4").frames == videos * 8


def test_reconstruct_verb_on_a_real_clip_and_photo(model, tmp_path, capsys):
    source = EMBEDDED / "heldout" / "bbb_kite.mp4"
    arguments = ["reconstruct", str(source), "-o", str(tmp_path), "--model", str(model)]
    arguments += ["--max-mse", "0.8", "--resolution", "16", "--max-frames", "9", "--json"]
    assert main(arguments) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["blocks"] == 3 * 2  # 9 frames in blocks of 4, 16 x 28 pixels in tiles of 16
    assert media.probe(tmp_path / "reconstruction.mp4").frames == 9
    assert (tmp_path / "reconstruction.png").stat().st_size > 0
    photo = EMBEDDED / "heldout" / "photo_chelsea.jpg"
    results = reconstruct_file(
        str(photo), model=model, output=tmp_path / "photo", goal=Goal(budget=0.5), resolution=16
    )
    assert results["tokens"] == sum(results["lengths"]) == 8  # half of 2 tiles of 8
    assert not (tmp_path / "photo" / "reconstruction.mp4").exists()
