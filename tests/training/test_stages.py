"""The mixture experiment: two stages through the command line, and clips that share a sequence
without seeing each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastictok_jax import cli
from elastictok_jax.config import read_config
from elastictok_jax.data.sources.splits import open_splits
from elastictok_jax.errors import UsageError
from elastictok_jax.storage.checkpoint import Checkpointer
from elastictok_jax.training.loop import train_experiment
from elastictok_jax.training.metric_writers import read_metrics
from tests.tiny import abstract_state, block_tokens, mesh_of, reader_of, task_of

pytestmark = pytest.mark.xdist_group("stages")  # one worker makes what they share

SMALL = {
    "model.width": 32,
    "model.mlp_width": 32,
    "model.encoder_layers": 1,
    "model.decoder_layers": 1,
    "video.resolution": 16,
    "masking.min_tokens": 1,
    "loss.lpips_weight": 0,
    "data.packing_rows": 8,
    "train.steps": 6,
    "train.log_every": 2,
    "train.checkpoint_every": 6,
    "train.eval_every": 6,
    "evaluation.batches": 1,
}


def run_stage(stage, workdir, **options) -> int:
    values = SMALL | {key.replace("__", "."): value for key, value in options.items()}
    words = [f"--config.{key}={value}" for key, value in values.items()]
    return cli.main(["train", f"mixture:stage={stage}", "--workdir", str(workdir), *words])


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    assert run_stage("images", folder / "images") == 0
    assert run_stage("video", folder / "video", train__init_from=folder / "images") == 0
    return folder


def params_at(workdir, step=None):
    config = read_config(workdir / "config.json")
    checkpoints = Checkpointer.for_reading(workdir)
    abstract = abstract_state(config, mesh_of(config)).params["model"]
    params = checkpoints.restore_params(step or checkpoints.latest_step(), "model", abstract)
    checkpoints.close()
    return config, params


def test_both_stages_train_and_the_second_starts_with_the_weights_of_the_first(stages):
    last = read_metrics(stages / "images" / "metrics.jsonl")[-1]
    lines = read_metrics(stages / "video" / "metrics.jsonl")
    assert all(line["padding_fraction"] == 0 for line in lines if "loss" in line)
    # Held-out error on other data, at the same weights: measured, not guessed.
    _, params = params_at(stages / "images")
    video = read_config(stages / "video" / "config.json")
    reader = reader_of(video, open_splits(video), split="heldout")
    sums, _ = eval_step_of(video)(params, device(reader(0)), np.float32(1.0))
    assert lines[0]["step"] == 0
    assert lines[0]["eval/mse"] == pytest.approx(float(sums["error"] / sums["tokens"]), rel=1e-5)
    assert lines[0]["eval/mse"] != pytest.approx(last["eval/mse"], rel=1e-3)
    assert lines[-1]["step"] == 6


def test_first_stage_sees_images_and_the_second_also_video(stages):
    for stage, kinds in (("images", {False}), ("video", {False, True})):
        config = read_config(stages / stage / "config.json")
        reader = reader_of(config, open_splits(config), split="train")
        clips = [clip for row in range(16) for clip in reader.mixture.row(row)]
        assert {bool(reader.feeds[c.feed].source.is_video[c.item]) for c in clips} == kinds


def eval_step_of(config):
    step = jax.jit(task_of(config).evaluate)
    return lambda params, batch, fraction: step({"model": params}, {}, batch, fraction)


def device(batch):
    return {key: jnp.asarray(batch[key]) for key in ("patches", "segment_ids")}


def test_two_clips_of_a_sequence_do_not_see_each_other(stages):
    """Changing all pixels of one changes no bit of the other's reconstruction."""
    config, params = params_at(stages / "video")
    reader = reader_of(config, open_splits(config), split="train")
    row = next(n for n in range(64) if 1 < len(reader.mixture.row(n)) < 6)
    batch = {key: np.asarray(reader.read_row(row)[key])[None] for key in ("patches", "segment_ids")}
    segments = batch["segment_ids"][0]
    step = eval_step_of(config)

    def reconstruct(patches):
        return np.asarray(step(params, device(batch | {"patches": patches}), np.float32(0.5))[1])[0]

    before = reconstruct(batch["patches"])
    for changed in np.unique(segments):
        inside = segments == changed
        patches = batch["patches"].copy()
        patches[0, inside] = 255 - patches[0, inside]
        after = reconstruct(patches)
        np.testing.assert_array_equal(after[~inside], before[~inside])
        assert (after[inside] != before[inside]).any()
    # Within a clip, a later block does see an earlier one.
    per_block = block_tokens(config)
    longest = max(np.unique(segments), key=lambda s: (segments == s).sum())
    start = int(np.flatnonzero(segments == longest)[0])
    patches = batch["patches"].copy()
    patches[0, start : start + per_block] = 255 - patches[0, start : start + per_block]
    after = reconstruct(patches)
    later = slice(start + per_block, start + 2 * per_block)
    assert (segments[later] == longest).all()
    assert (after[later] != before[later]).any()


def test_weights_of_another_shape_or_run_are_refused(stages, tmp_path):
    config = read_config(stages / "video" / "config.json")
    config.model.width = 64
    config.train.init_from = str(stages / "images")
    with pytest.raises(UsageError, match=r"encoder.* saved, .* asked for"):
        train_experiment(config, workdir=tmp_path / "run")
    config.train.init_from = str(tmp_path / "nothing")
    with pytest.raises(UsageError, match=r"train\.init_from = .*nothing does not exist"):
        train_experiment(config, workdir=tmp_path / "run")
    assert not (tmp_path / "nothing").exists()


def test_resuming_takes_the_checkpoint_and_not_init_from(stages, capsys):
    workdir = stages / "video"
    options = dict(train__init_from=stages / "gone", train__steps=8)
    assert run_stage("video", workdir, **options) == 0
    assert "resuming at step 6" in capsys.readouterr().err
