"""The router: fitted to curves, kept in a file, asked by the searches."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest

from elastictok_jax import ElasticTokenizer, cli
from elastictok_jax.config import config_to_json
from elastictok_jax.data import media
from elastictok_jax.errors import UsageError
from elastictok_jax.storage.safetensors import save_safetensors
from elastictok_jax.tokenizer.goal import Goal
from elastictok_jax.tokenizer.router import (
    FILE,
    Router,
    predict_errors,
    router_features,
    router_octave_energies,
)
from elastictok_jax.tokenizer.router_training import (
    fit_router,
    held_back_router_items,
    router_training_clips,
    train_router,
    trained_router_count_error,
)
from elastictok_jax.tokenizer.tiling import TileGrid
from tests.tokenizer.small import LENGTH, make_tokenizer, moving_clip

KNOTS = (1, 2, 4, 8)


@pytest.fixture(scope="module")
def problem():
    """Curves that are a function of the features, and noise."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((600, 10)).astype(np.float32)
    level = features[:, :1] + np.sin(2 * features[:, 1:2])
    curves = level - (0.5 + 0.3 * np.tanh(features[:, 2:3])) * np.log(KNOTS)
    return features, curves + 0.01 * rng.standard_normal(curves.shape)


def test_a_head_learns_more_than_the_mean_curve(problem):
    features, curves = problem
    held_back = np.arange(600) % 5 == 0
    params, step = fit_router(features, curves, held_back=held_back, steps=800, seed=0)
    assert step >= 100
    predicted = np.asarray(predict_errors(params, features[held_back], knots=4))
    error = np.abs(predicted - curves[held_back]).mean()
    assert error < 0.3 * np.abs(curves[~held_back].mean(axis=0) - curves[held_back]).mean()
    mean = np.broadcast_to(curves[~held_back].mean(axis=0), predicted.shape)
    assert trained_router_count_error(
        predicted, curves[held_back], list(KNOTS)
    ) < 0.5 * trained_router_count_error(mean, curves[held_back], list(KNOTS))
    assert trained_router_count_error(curves, curves, list(KNOTS)) == 0
    again, _ = fit_router(features, curves, held_back=held_back, steps=800, seed=0)
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.fixture(scope="module", params=[True, False], ids=["conditioned", "unconditioned"])
def folder(request, tmp_path_factory):
    """A tiny exported model with a router that `train-router` made."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer(**{"model.conditioned": request.param})
    (folder / "config.json").write_text(config_to_json(tokenizer.config))
    save_safetensors(folder / "model.safetensors", jax.device_get(tokenizer.params), metadata={})
    return folder


def test_a_folder_that_cannot_take_the_router_is_refused_before_the_work(folder):
    in_the_way = folder / "router.safetensors"
    in_the_way.mkdir()
    try:
        with pytest.raises(UsageError, match=r"router\.safetensors cannot be written"):
            train_router(folder, blocks=10**9, steps=1)
    finally:
        in_the_way.rmdir()


def test_a_router_learns_from_frames_as_training_reads_them(tmp_path):
    frames = np.empty((48, 24, 24, 3), np.uint8)
    frames[:] = 5 * np.arange(48)[:, None, None, None]
    frames[:, :, :4] = 0  # a dark edge, out of reach of a crop at the centre
    media.write_video(tmp_path / "a.mkv", frames, fps=24, codec="ffv1")
    main = {"path": str(tmp_path), "fps": 4.0, "resolution": 24, "crop": "center"}
    settings = {f"data.sources.main.{key}": value for key, value in main.items()}
    config = make_tokenizer(**settings, **{"data.eval_fraction": 0.0}).config
    for item, video in itertools.islice(router_training_clips(config), 3):
        assert item == (0, 0) and video.shape == (8, 16, 16, 3)
        np.testing.assert_allclose(video.mean(axis=(1, 2, 3)), 5 * 6 * np.arange(8), atol=2)


def test_train_router_and_use_it(folder, capsys):
    clip = moving_clip(frames=20)
    without = ElasticTokenizer.from_pretrained(folder)
    with pytest.raises(UsageError, match="run elastictok train-router"):
        without.encode(clip, max_mse=0.3, search="regression")
    arguments = ["train-router", str(folder), "--blocks", "20", "--steps", "100", "--json"]
    assert cli.main(arguments) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["blocks"] == 20 and 0 <= results["count_error"] < np.inf

    tokenizer = ElasticTokenizer.from_pretrained(folder)
    grid = TileGrid(clip.shape[:3], tokenizer.geometry)
    costs = {}
    for search in ("regression", "verified_regression", "hybrid"):
        policy = tokenizer.threshold(Goal(max_mse=0.3, search=search))
        costs[search] = tokenizer.code(clip, grid, [policy], metric="mse")
    assert [block.evaluations for block in costs["regression"]] == [1] * 5
    # The encoding that the router reads serves for the codes where it knows no length.
    passes = 2 if tokenizer.codec.knows_length else 1
    assert [block.encoder_passes for block in costs["regression"]] == [passes] * 5
    assert all(block.met == (block.error <= 0.3) for block in costs["regression"])
    # `hybrid` follows what was measured on the block before, router or not.
    policy = without.threshold(Goal(max_mse=0.3, search="hybrid"))
    plain = without.code(clip, grid, [policy], metric="mse")
    for one, other in zip(plain, costs["hybrid"], strict=True):
        np.testing.assert_array_equal(one.codes, other.codes)
        assert one.evaluations == other.evaluations
    curve = tokenizer.router(tokenizer.coder("mse").block(*(x[0, 0] for x in grid.cut(clip))))
    assert curve.shape == (LENGTH,) and np.isfinite(curve).all()
    with pytest.raises(UsageError, match="give max_mse or min_psnr"):
        tokenizer.encode(clip, max_lpips=0.3, search="regression")

    # A router that promises too much, or nothing, costs evaluations and no target.
    right = tokenizer.router
    for wrong in (-9, 9):
        mean = right.params["mean"] + np.float32(wrong)
        tokenizer.router = dataclasses.replace(right, params={**right.params, "mean": mean})
        chosen: list[int] = []
        tokens = tokenizer.encode(clip, max_mse=0.3, search="verified_regression")
        for index, length in enumerate(tokens.lengths):
            whole = tokenizer.encode(clip[: 4 * (index + 1)], tokens=[*chosen, LENGTH])
            assert tokens.met[index] or whole.mse[index] > 0.3
            chosen.append(int(length))
    tokenizer.router = right

    # After more training the router is stale; the fix that is named works.
    stale = dataclasses.replace(tokenizer.router, fingerprint="0" * 16)
    stale.save(folder)
    with pytest.raises(UsageError, match="train it again"):
        ElasticTokenizer.from_pretrained(folder)
    assert cli.main(arguments) == 0
    again = ElasticTokenizer.from_pretrained(folder).router
    jax.tree.map(np.testing.assert_array_equal, again.params, tokenizer.router.params)

    # Nor is it of use when the config says that other lengths may be chosen.
    dataclasses.replace(again, lengths=(2, *again.lengths[1:])).save(folder)
    with pytest.raises(UsageError, match=r"covers 2 to 8 tokens, .* train it again"):
        ElasticTokenizer.from_pretrained(folder)
    again.save(folder)


def test_all_blocks_of_an_item_are_held_back_or_none():
    items = [7, 7, 3, 7, 5, 3, 9, 1, 1, 2, 7]
    held_back = held_back_router_items(items)
    assert held_back.any() and not held_back.all()
    for item in set(items):
        assert len(set(held_back[np.asarray(items) == item])) == 1
    with pytest.raises(UsageError, match="all of one item"):
        held_back_router_items([3, 3, 3])


def test_energies_of_all_scales_make_up_the_variance():
    rng = np.random.default_rng(0)
    video = rng.random((2, 16, 24, 3)).astype(np.float32)
    *bands, total = router_octave_energies(video)
    about_mean = video - video.mean(axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(total, np.mean(about_mean**2), rtol=1e-4)
    np.testing.assert_allclose(sum(bands), total, rtol=1e-4)
    coarse = np.repeat(np.repeat(rng.random((2, 4, 6, 3)), 4, axis=1), 4, axis=2)
    np.testing.assert_allclose(
        router_octave_energies(coarse)[:2], 0, atol=1e-6
    )  # nothing as fine as 2 or 4


def test_features_tell_still_from_moving_and_know_the_block_before():
    frame = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), dtype=np.uint8)
    latents = np.zeros((8, 2), np.float32)
    still = router_features(latents, np.repeat(frame, 4, axis=0), previous=None)
    moving = router_features(latents, np.concatenate([frame, frame[:, ::-1]] * 2), previous=None)
    assert still.shape == moving.shape and np.isfinite([still, moving]).all()
    assert np.abs(still - moving).max() > 1
    after = router_features(latents, np.repeat(frame, 4, axis=0), previous=(4, 0.1))
    np.testing.assert_array_equal(after[:-3], still[:-3])
    np.testing.assert_allclose((after - still)[-3:], [1, np.log(0.1), np.log(0.5)], rtol=1e-6)


def test_a_router_of_another_model_or_damaged_is_refused(folder, tmp_path):
    params = {"center": np.zeros(3, np.float32), "scale": np.ones(3, np.float32)}
    Router(params, KNOTS, "0" * 16).save(folder)
    with pytest.raises(UsageError, match="belongs to model 0000000000000000"):
        ElasticTokenizer.from_pretrained(folder)
    Router(params, KNOTS, "abc").save(tmp_path)
    with pytest.raises(UsageError, match=r"is damaged .* train it again"):
        Router.load(tmp_path, fingerprint="abc", low=1, high=8)
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole[:40])
    with pytest.raises(UsageError, match=FILE):
        Router.load(tmp_path, fingerprint="abc", low=1, high=8)
    (folder / FILE).unlink()
