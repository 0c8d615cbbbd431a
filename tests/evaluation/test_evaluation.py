"""Figures and pictures of a tokenizer, on real footage with a small random model."""

import json
import re
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from elastictok_jax.cli import main
from elastictok_jax.config import (
    apply_overrides,
    config_to_json,
    default_config,
    read_config,
    resolve_config,
)
from elastictok_jax.data import media, packing
from elastictok_jax.data.clip_reader import ClipReader
from elastictok_jax.data.mixture import mixture_item_blocks
from elastictok_jax.data.sources.file_source import EMBEDDED
from elastictok_jax.data.sources.splits import open_splits
from elastictok_jax.errors import UsageError
from elastictok_jax.evaluation.eval_clips import (
    EvalClip,
    EvaluationOverrides,
    clips_to_show,
    evaluation_clips,
)
from elastictok_jax.evaluation.evaluate import REPORT, evaluate_models
from elastictok_jax.evaluation.reconstruct import reconstruct_file
from elastictok_jax.pixels import pixel_mse, pixel_psnr
from elastictok_jax.storage.outputs import remove_outputs
from elastictok_jax.storage.safetensors import save_safetensors
from elastictok_jax.tokenizer.goal import Goal
from tests.evaluation.report.test_page import PHONE, require_sound
from tests.tiny import made_up_state


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    config = default_config()
    apply_overrides(
        config,
        {
            **{"model.width": 16, "model.mlp_width": 16, "model.heads": 1},
            **{"compute.dtype": "float32", "model.encoder_layers": 1, "model.decoder_layers": 1},
            **{"model.patch": (2, 8, 8), "video.resolution": 16, "masking.min_tokens": 1},
            **{"data.sequence_blocks": 2, "evaluation.max_blocks": 4},
            **{"evaluation.targets": (0.5, 1.0), "evaluation.search_blocks": 1},
        },
    )
    config = resolve_config(config)
    (folder / "config.json").write_text(config_to_json(config))
    params = jax.device_get(made_up_state(config).params["model"])
    save_safetensors(folder / "model.safetensors", params, metadata={})
    return folder


def test_mse_and_psnr():
    black, white = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 255, np.uint8)
    assert pixel_mse(black, white) == pytest.approx(4.0)
    assert pixel_psnr(4.0) == pytest.approx(0.0)
    assert pixel_psnr(0.04) == pytest.approx(20.0)
    assert pixel_psnr(0.0) == float("inf")


@pytest.fixture(scope="module")
def fixed_model(model, tmp_path_factory):
    """Other weights, as if trained for half of the tokens."""
    folder = tmp_path_factory.mktemp("fixed")
    config = read_config(model / "config.json")
    apply_overrides(config, {"masking.kind": "fixed", "masking.fraction": 0.5, "seed": 1})
    (folder / "config.json").write_text(config_to_json(config))
    params = jax.device_get(made_up_state(config).params["model"])
    save_safetensors(folder / "model.safetensors", params, metadata={})
    return folder


@pytest.fixture(autouse=True)
def no_fetched_weights(monkeypatch, tmp_path):
    """I3D takes a second a clip: what was fetched on this machine is not for these tests."""
    monkeypatch.setenv("ELASTICTOK_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def finished(model, fixed_model, tmp_path_factory):
    """A whole evaluation of two models, and what it returned."""
    folder = tmp_path_factory.mktemp("evaluation")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ELASTICTOK_CACHE", str(folder / "cache"))
        limits = EvaluationOverrides(max_clips=2)
        return folder, evaluate_models([model, fixed_model], output=folder, limits=limits)


@pytest.mark.xdist_group("evaluation_finished")  # made once
def test_evaluate_measures_all_clips_by_all_models(finished):
    folder, results = finished
    assert json.loads((folder / "metrics.json").read_text()) == results
    held_out = {path.stem for path in (EMBEDDED / "heldout").iterdir()}
    assert len(results["clips"]) == 4 and set(results["clips"]) < held_out
    elastic, fixed = results["models"]
    assert (elastic["fixed_tokens"], fixed["fixed_tokens"]) == (None, 4)
    for kind, clips in (("videos", 2), ("images", 2)):
        assert elastic[kind]["clips"] == fixed[kind]["clips"] == clips
        assert [row["target"] for row in elastic[kind]["thresholds"]] == [0.5, 1.0]
        assert [row["tokens"] for row in fixed[kind]["rates"]] == [4.0]
        assert all(row["tokens_mean"] == 4 for row in fixed[kind]["thresholds"])
        assert elastic[kind]["energy"].keys() == (
            {"single_block", "multi_block"} if kind == "videos" else {"single_block"}
        )
        rates = elastic[kind]["rates"]
        assert [row["share"] for row in rates] == elastic["shares"]
        pixels = 256 * (4 if kind == "videos" else 1)  # of a block
        for row in rates:
            assert row["bpp16"] == pytest.approx(16 * row["tokens"] * np.log2(64000) / pixels)
            assert row["psnr_of_mse"] == pytest.approx(pixel_psnr(row["mse"]))
            assert row["ssim"] <= 1 and row["lpips_alex"] > 0 and row["ms_ssim"] is None
            assert row["bpp16_coded"] > 0 and row["fvd_i3d_k400_logits"] is None
    assert [row["blocks"] for row in elastic["videos"]["context"]] == [1, 2]
    searches = {row["search"]: row for row in elastic["videos"]["searches"]}
    assert searches.keys() == {"full", "binned", "binary", "hybrid"}
    assert searches["full"]["evaluations_per_block"] > searches["hybrid"]["evaluations_per_block"]
    assert len(results["comparisons"]) == 2 * 2


def test_a_fixed_model_alone(fixed_model, tmp_path):
    limits = EvaluationOverrides(targets="0.01,1.0", max_clips=1, max_blocks=1)
    results = evaluate_models([fixed_model], output=tmp_path, limits=limits)
    assert results["comparisons"] == []
    for clip in results["clips"].values():
        strict, loose = clip
        assert strict["lengths"] == loose["lengths"] == [4]
        assert (strict["blocks_met"], loose["blocks_met"]) == (0, 1)
    assert (tmp_path / "plots" / "targets_met_by_tokens_used.png").is_file()
    assert not (tmp_path / "plots" / "tokens_and_high_frequency_energy.png").exists()


@pytest.mark.xdist_group("evaluation_finished")  # made once
def test_clips_of_the_first_model_are_told_one_by_one(finished):
    _, results = finished
    lengths = {}
    for name, clip in results["clips"].items():
        assert [line["target_mse"] for line in clip] == [0.5, 1.0]
        for line in clip:
            assert line["tokens"] == sum(line["lengths"])
            assert line["blocks"] == len(line["lengths"]) == len(line["block_mse"])
            met = sum(error <= line["target_mse"] for error in line["block_mse"])
            assert line["blocks_met"] == met
        lengths[name] = clip[0]["lengths"]
    videos = np.concatenate([lengths[name] for name in lengths if not name.startswith("photo")])
    row = results["models"][0]["videos"]["thresholds"][0]
    assert row["tokens_mean"] == pytest.approx(videos.mean())


@pytest.mark.xdist_group("evaluation_finished")  # made once
def test_evaluate_writes_pictures_tables_and_a_page(finished):
    folder, _ = finished
    with Image.open(folder / "report.png") as picture:
        assert min(picture.size) > 500
        assert np.asarray(picture.convert("L")).std() > 5  # something is drawn on it
    assert media.probe(folder / "report.mp4").frames == 2 * 16
    for name in ("targets_met_by_tokens_used", "tokens_over_time", "error_by_tokens", "context"):
        assert (folder / "plots" / f"{name}.png").stat().st_size > 5000
        assert (folder / "plots" / f"{name}.svg").read_text().startswith("<?xml")
    tables = {path.stem for path in (folder / "tables").glob("*.csv")}
    assert {
        "models",
        "thresholds",
        "searches",
        "targets_met_by_tokens_used",
        "rate_and_distortion",
    } <= tables
    require_sound(folder / "report.html", size=PHONE, plots=8, videos=1)


@pytest.mark.xdist_group("evaluation_finished")  # made once
def test_interrupted_and_run_again_it_ends_the_same(model, finished, fixed_model, tmp_path):
    words = [str(model), "--baseline", str(fixed_model), "--max-clips", "2", "-o", str(tmp_path)]
    command = [sys.executable, "-m", "elastictok_jax", "evaluate", *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    records = tmp_path / "records"
    while process.poll() is None and len(list(records.glob("*.npz"))) < 2:
        time.sleep(0.05)
    assert process.poll() is None, process.communicate()[1]
    process.kill()
    process.wait()
    made = {path: path.stat().st_mtime_ns for path in records.glob("*.npz")}
    assert 2 <= len(made) < 8
    assert not (tmp_path / "metrics.json").exists()
    min(made).write_bytes(b"cut short")  # as after a full disk: it is measured again
    again = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True)
    assert again.returncode == 0, again.stderr
    kept = [path for path, when in made.items() if path.stat().st_mtime_ns == when]
    assert len(kept) == len(made) - 1
    ours, theirs = (
        without_times((folder / "metrics.json").read_text()) for folder in (tmp_path, finished[0])
    )
    assert ours == theirs


def without_times(text):
    return re.sub(r'"seconds_per_block": [^,\n]+', "", text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video.frames_per_block": 2}, "has video.frames_per_block = 2, .* 4: compare models"),
        ({}, "a model is given twice"),
    ],
)
def test_models_that_cannot_be_compared_are_refused(model, tmp_path, change, message):
    config = read_config(model / "config.json")
    apply_overrides(config, change)
    (tmp_path / "config.json").write_text(config_to_json(config))
    weights = (model / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights)
    with pytest.raises(UsageError, match=message):
        evaluate_models([model, tmp_path], output=tmp_path / "out")


def test_nothing_of_data_of_ones_own_is_held_out(model, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("bbb_kite.mp4", "photo_rocket.jpg", "photo_peaks.jpg"):
        (folder / name).write_bytes((EMBEDDED / "heldout" / name).read_bytes())
    limits = EvaluationOverrides(targets="0.7", max_blocks=1, search_blocks=0)
    results = evaluate_models([model], output=tmp_path / "out", data=str(folder), limits=limits)
    assert set(results["clips"]) == {"bbb_kite", "photo_rocket", "photo_peaks"}
    assert results["plan"]["targets"] == [0.7]
    assert results["plan"]["fps"] == [results["clips"]["bbb_kite"][0]["fps"]] == [24.0]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "video at 24 frames a second" in page
    assert results["models"][0]["videos"]["searches"] == []


def test_flat_pictures_have_a_place_on_a_log_axis(model, tmp_path):
    (tmp_path / "data").mkdir()
    Image.new("RGB", (32, 32), (90, 90, 90)).save(tmp_path / "data" / "flat.png")
    limits = EvaluationOverrides(targets="0.7", max_blocks=1, search_blocks=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of matplotlib, that there is no such place
        results = evaluate_models(
            [model], output=tmp_path / "out", data=str(tmp_path / "data"), limits=limits
        )
    assert set(results["clips"]) == {"flat"}
    assert (tmp_path / "out" / "plots" / "tokens_and_high_frequency_energy.png").stat().st_size


@pytest.mark.parametrize("settings", [{}, {"fps": 4.0, "resolution": 20}, {"fps": 24.0}])
def test_clips_are_those_that_training_reads_of_the_held_out_split(model, settings):
    config = read_config(model / "config.json")
    apply_overrides(config, {"evaluation.max_blocks": 6})
    config.data.sources.main.update(path="embedded", **settings)
    clips = {clip.name: clip for clip in evaluation_clips(config)}
    feeds = open_splits(config).heldout
    reader = ClipReader(feeds, config, split="heldout")
    (feed,), per_block = feeds, config.video.frames_per_block
    counts = mixture_item_blocks(feed, frames_per_block=per_block)
    for item, count in zip(feed.items, counts, strict=True):
        clip = clips[Path(feed.source.name(item)).stem]
        rate = feed.source.fps[item]
        assert clip.fps == min(rate, settings.get("fps") or rate)
        blocks = min(6, int(count))
        trained = reader.read(packing.PackedClip(0, int(item), 0, 0, blocks), range(blocks))
        frames = np.concatenate([block.frames for block in trained])
        if rate:
            np.testing.assert_array_equal(clip.frames[: len(frames)], frames[: len(clip.frames)])
            seconds = feed.source.frames[item] / rate
            assert len(clip.frames) == min(6 * per_block, int(np.ceil(seconds * clip.fps - 1e-9)))
        else:
            np.testing.assert_array_equal(clip.frames, frames[:1])


def test_other_data_is_read_like_the_models_source_unless_told(model, capsys):
    config = read_config(model / "config.json")
    config.data.sources.main.update(fps=4.0)
    data = str(EMBEDDED / "heldout" / "bbb_kite.mp4")
    (slow,), (full,) = (
        evaluation_clips(config, data=data),
        evaluation_clips(config, data=data, fps=0),
    )
    assert (slow.fps, full.fps) == (4.0, media.probe(data).fps)
    assert "read like" not in capsys.readouterr().err
    config.unlock()
    apply_overrides(config, {"data.sources.a.path": "embedded", "data.sources.a.kind": "image"})
    (mixed,) = evaluation_clips(config, data=data)
    np.testing.assert_array_equal(mixed.frames, slow.frames)
    assert "--data is read like data.sources.main: fps 4" in capsys.readouterr().err
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="--fps"):
            evaluation_clips(config, data=data, fps=wrong)


def test_a_model_of_continuous_latents(model, tmp_path):
    config = read_config(model / "config.json")
    apply_overrides(config, {"model.bottleneck": "vae"})
    folder = tmp_path / "vae"
    folder.mkdir()
    (folder / "config.json").write_text(config_to_json(config))
    params = jax.device_get(made_up_state(resolve_config(config)).params["model"])
    save_safetensors(folder / "model.safetensors", params, metadata={})
    limits = EvaluationOverrides(targets="0.7", max_clips=1, max_blocks=1, search_blocks=0)
    results = evaluate_models([folder], output=tmp_path / "out", limits=limits)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == results
    for row in results["models"][0]["images"]["rates"]:
        assert row["bpp16"] == pytest.approx(16 * row["tokens"] * 8 * 32 / 256)  # 8 float32 a token
        assert row["bpp16_coded"] is None and "perplexity" not in row


@pytest.mark.parametrize(("videos", "images"), [(9, 30), (4, 10), (3, 1), (0, 2), (1, 0)])
def test_the_pictured_clips_are_a_few_of_each_kind(videos, images):
    clips = [EvalClip(f"v{n}", np.zeros((2, 1, 1, 3), np.uint8), 24.0) for n in range(videos)]
    clips += [EvalClip(f"i{n}", np.zeros((1, 1, 1, 3), np.uint8), 0.0) for n in range(images)]
    names = [clip.name for clip in clips_to_show(clips)]
    assert len(set(names)) == len(names) == min(videos, 4) + min(images, 10)
    for kind, count in (("v", videos), ("i", images)):
        if count:
            assert f"{kind}0" in names
        if count > 1:
            assert f"{kind}{count - 1}" in names  # from the first to the last


def test_reconstruct_verb_on_a_real_clip_and_photo(model, tmp_path, capsys):
    source = EMBEDDED / "heldout" / "bbb_kite.mp4"
    arguments = ["reconstruct", str(source), "-o", str(tmp_path), "--model", str(model)]
    arguments += ["--max-mse", "0.8", "--resolution", "16", "--max-frames", "9", "--json"]
    assert main(arguments) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["blocks"] == 3 * 2  # 9 frames in blocks of 4, 16 x 28 pixels in tiles of 16
    assert media.probe(tmp_path / "reconstruction.mp4").frames == 9
    assert (tmp_path / "reconstruction.png").stat().st_size > 0
    photo = tmp_path / "_$x$ 中\n$.jpg"
    shutil.copy(EMBEDDED / "heldout" / "photo_chelsea.jpg", photo)
    results = reconstruct_file(
        str(photo), model=model, output=tmp_path, goal=Goal(budget=0.5), resolution=16
    )
    assert results["tokens"] == sum(results["lengths"]) == 8  # half of 2 tiles of 8
    assert not (tmp_path / "reconstruction.mp4").exists()  # that of the clip before


def test_no_output_of_an_earlier_run_stays(tmp_path):
    (tmp_path / "plots").mkdir()
    for name in ("report.html", "plots/old.png", "notes.txt"):
        (tmp_path / name).write_text("old")
    remove_outputs(tmp_path, REPORT)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_output_that_cannot_be_written_is_refused_before_the_work(model, tmp_path):
    source = str(EMBEDDED / "heldout" / "photo_chelsea.jpg")
    (tmp_path / "file").write_text("in the way")
    for output in (tmp_path / "file", tmp_path / "file" / "folder", Path("/proc/no")):
        with pytest.raises(UsageError, match="cannot be written"):
            reconstruct_file(source, model=model, output=output, goal=Goal(tokens=1))
        with pytest.raises(UsageError, match="cannot be written"):
            evaluate_models([model], output=output)
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_full_disk_names_the_file_and_leaves_none(tmp_path):
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "from elastictok_jax.storage.atomic import write_atomically\n"
        "write_atomically(Path(sys.argv[1]) / 'a.png', bytes(1000))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert f"RunError: {tmp_path / 'a.png'} cannot be written (File too large)" in done.stderr
    assert not list(tmp_path.iterdir())
