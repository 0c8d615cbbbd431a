"""The benchmark of real bytes: its search is right, and its figures mean what they say."""

import json

import pytest

from benchmarks import rate
from elastictok_jax.config import apply_overrides, config_to_json, default_config, resolve_config
from elastictok_jax.data.sources.file_source import EMBEDDED
from elastictok_jax.storage.safetensors import save_safetensors
from tests.tiny import made_up_state

SMALL = {
    **{"model.width": 32, "model.mlp_width": 48, "model.heads": 2, "model.patch": (2, 16, 16)},
    **{"model.encoder_layers": 1, "model.decoder_layers": 1, "video.resolution": 64},
    **{"masking.min_tokens": 1, "data.sequence_blocks": 2},
}


@pytest.mark.parametrize(
    ("target", "crf"), [(100.0, 51), (51.0, 51), (50.9, 50), (7.0, 7), (0.0, 0), (-0.1, None)]
)
def test_the_coarsest_crf_within_an_error(target, crf):
    tried = []

    def try_crf(value):
        tried.append(value)
        return float(value)

    assert rate.coarsest_within(try_crf, coarsest=51, target=target) == crf
    assert len(tried) <= 9


def test_figures_of_a_tiny_model(tmp_path, capsys):
    config = default_config()
    apply_overrides(config, SMALL)
    config = resolve_config(config)
    (tmp_path / "config.json").write_text(config_to_json(config))
    save_safetensors(
        tmp_path / "model.safetensors", made_up_state(config).params["model"], metadata={}
    )
    clip, out = EMBEDDED / "heldout" / "bbb_kite.mp4", tmp_path / "out.json"
    words = ["--model", str(tmp_path), "--input", str(clip), "--frames", "8", "--json", str(out)]
    rate.main([*words, "--targets", "9"])
    results = json.loads(out.read_text())
    assert results["machine"] in capsys.readouterr().out
    (row,) = results["rows"]
    assert row["size"] == "8x64x64"
    assert row["blocks_met"] == 1
    assert row["tokens"] == 2  # one a block
    assert row["mse"] <= 9
    assert row["nominal_bytes"] == 4
    assert 0 < row["coded_bytes"] < row["etok_bytes"] - 300
    for name in rate.SHORT_NAMES.values():
        assert row[f"{name}_mse"] <= row["mse"]
        assert 50 < row[f"{name}_bytes"] < 5000
