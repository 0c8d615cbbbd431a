"""The benchmark of the input pipeline runs, and its figures mean what they say."""

import json

import pytest

from benchmarks import data
from elastictok_jax.data import media
from elastictok_jax.data.sources.file_source import EMBEDDED


def test_quick_run(tmp_path, capsys):
    originals = tmp_path / "media"
    originals.mkdir()
    frames = media.read_frames(EMBEDDED / "heldout" / "bbb_kite.mp4", count=40, side=32)
    media.write_video(originals / "clip.mp4", frames, fps=24)
    media.write_image(originals / "still.png", frames[0])
    data.main(["--quick", "--media", str(originals), "--json", str(tmp_path / "out.json")])
    results = json.loads((tmp_path / "out.json").read_text())
    assert results["machine"] in capsys.readouterr().out
    for row in results["against_raw"]:
        rates = row["raw_frames_per_second"], row["pipeline_frames_per_second"]
        assert row["overhead"] == pytest.approx(rates[0] / rates[1] - 1)
    assert {row["kind"] for row in results["against_raw"]} == {"video", "image"}
    assert {row["source"] for row in results["throughput"]} == {"prepared", "folder", "synthetic"}
    assert all(row["frames_per_second"] > 0 for row in results["throughput"])
    assert [row["padding_fraction"] for row in results["packing"]] == [0, 0, 0, 0]
