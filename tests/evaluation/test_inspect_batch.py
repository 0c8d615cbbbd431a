"""`elastictok inspect-data` shows what the training step will really meet."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from elastictok_jax import cli
from elastictok_jax.config import apply_overrides, resolve_config
from elastictok_jax.data.sources.splits import open_splits
from elastictok_jax.evaluation.inspect_batch import (
    evenly_spaced_thumbnails,
    inspected_batch_lengths,
)
from elastictok_jax.evaluation.report.figures import shorten_figure_label
from elastictok_jax.experiment_registry import get_experiment
from tests.tiny import block_tokens, made_up_state, make_train_step, reader_of, task_of

SMALL = {
    "model.width": 16,
    "model.mlp_width": 16,
    "model.encoder_layers": 1,
    "model.decoder_layers": 1,
    "video.resolution": 16,
    "masking.min_tokens": 1,
    "data.batch_size": 3,
}


def small_config(**overrides):
    config = get_experiment("mixture:stage=video")
    apply_overrides(
        config, SMALL | {key.replace("__", "."): value for key, value in overrides.items()}
    )
    return config


def inspect(output, *words, **overrides) -> int:
    values = SMALL | {key.replace("__", "."): value for key, value in overrides.items()}
    options = [f"--config.{key}={value}" for key, value in values.items()]
    words = [str(word) for word in words]
    return cli.main(["inspect-data", "mixture:stage=video", "-o", str(output), *words, *options])


def test_lengths_are_those_that_the_step_draws():
    config = resolve_config(small_config())
    reader = reader_of(config, open_splits(config), split="train")
    step = jax.jit(make_train_step(config))
    state = made_up_state(config)
    for number in range(3):
        batch = {k: jnp.asarray(v) for k, v in reader(number).items() if k != "faults"}
        state, metrics = step(state, batch, {})
        drawn = inspected_batch_lengths(config, task_of(config), number)
        assert drawn.shape == (3, config.data.sequence_blocks)
        expected = drawn.mean() / block_tokens(config)
        assert float(metrics["kept_fraction"]) == pytest.approx(expected, rel=1e-5)


def test_picture_and_json_are_of_the_real_batch(tmp_path, capsys):
    output = tmp_path / "batch.png"
    assert inspect(output, "--batch", 2, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    config = resolve_config(small_config())
    reader = reader_of(config, open_splits(config), split="train")
    assert [row["row"] for row in shown["rows"]] == [6, 7, 8]
    lengths = inspected_batch_lengths(config, task_of(config), 2)
    for place, row in enumerate(shown["rows"]):
        clips = reader.mixture.row(row["row"])
        found = [(c["source"], c["item"], c["start"], c["blocks"]) for c in row["clips"]]
        assert found == [
            (feed.name, feed.source.name(c.item), c.start, c.blocks)
            for c in clips
            for feed in (reader.feeds[c.feed],)
        ]
        segments = reader.read_row(row["row"])["segment_ids"][:: block_tokens(config)]
        assert row["segments"] == segments.tolist()
        assert row["lengths"] == lengths[place].tolist()
    assert (shown["padding_fraction"], shown["replaced_blocks"]) == (0, 0)
    with Image.open(output) as image:
        assert image.format == "PNG" and image.width >= 900 and image.height > 3 * 150
        assert len(set(np.asarray(image.convert("L")).ravel().tolist())) > 100  # not blank


def test_long_rows_and_held_out_batches(tmp_path, capsys):
    assert inspect(tmp_path / "long.png", data__sequence_blocks=256, data__batch_size=1) == 0
    with Image.open(tmp_path / "long.png") as image:
        assert image.width < 2500
    assert inspect(tmp_path / "held.png", "--split", "heldout", "--json") == 0
    assert "lengths" not in json.loads(capsys.readouterr().out)["rows"][0]


def test_bad_use_is_one_line(tmp_path, capsys):
    for output, words, said in (
        (tmp_path / "x.jpg", (), "give a .png"),
        (tmp_path / "nowhere" / "x.png", (), "in a folder that exists"),
        (tmp_path / "x.png", ("--batch", -1), "batches count from 0"),
    ):
        assert inspect(output, *words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line


def test_blocks_shown_are_even_and_names_are_cut_in_the_middle():
    assert evenly_spaced_thumbnails(4, most=9).tolist() == [0, 1, 2, 3]
    assert evenly_spaced_thumbnails(100, most=4).tolist() == [0, 25, 50, 75]
    assert shorten_figure_label("a/long/name.mp4", 100) == "a/long/name.mp4"
    assert (
        len(shorten_figure_label("a/long/name.mp4", 9)) == 9
        and shorten_figure_label("a/long/name.mp4", 9)[-3:] == "mp4"
    )
