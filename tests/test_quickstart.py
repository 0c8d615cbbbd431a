"""The quick start as a user runs it: minutes, so behind the marker `slow` (`make test-slow`)."""

import json

import pytest

from elastictok_jax import cli


@pytest.mark.slow
def test_quickstart_learns_and_adapts(tmp_path):
    assert cli.main(["train", "quickstart", "--workdir", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "reports" / "metrics.json").read_text())
    error = results["held_out_mse"]
    assert error["first"] / error["last"] >= 5
    static, busy = (results["clips"][name] for name in ("bbb_static_skyline", "city_busy"))
    for one, other in zip(static, busy, strict=True):
        assert one["target_mse"] == other["target_mse"]
        assert one["tokens_per_block"] < other["tokens_per_block"]
    for name in ("report.png", "report.mp4"):
        assert (tmp_path / "reports" / name).stat().st_size > 100_000
