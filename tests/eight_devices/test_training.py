"""Training on any mesh of 8 devices is training on one, and a run goes on from one mesh to another.

The model is float32 and tiny. Gradients are those of the step itself: AdamW's first moments after
one step are (1 - b1) times them, as nothing is clipped.
"""

import itertools
import runpy
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from elastictok_jax.losses.perceptual import frames_for_perceptual_loss
from elastictok_jax.parallel.sharding import batch_sharding
from elastictok_jax.storage.checkpoint import Checkpointer
from tests.tiny import abstract_state, block_tokens, codec_of

SCRIPT = Path(__file__).parent.parent / "multiprocess" / "train_steps.py"
run = SimpleNamespace(**runpy.run_path(str(SCRIPT)))
MESHES = ("1x1x1x1", "8x1x1x1", "1x8x1x1", "2x2x2x1", "1x2x2x2", "1x1x1x8")


class Run:
    """One run on one mesh, saved in the middle."""

    def __init__(self, sizes, initial, *, folder, **overrides):
        self.config = run.config_for(sizes, **overrides)
        self.mesh = run.mesh_for(self.config)
        self.abstract = abstract_state(self.config, self.mesh)
        self.step = run.jitted_step(self.config, self.mesh)
        self.checkpoints = Checkpointer(folder / sizes, keep_last=1, keep_best=0)
        state = jax.device_put(initial, jax.tree.map(lambda leaf: leaf.sharding, self.abstract))
        state, first = self.go_on(state, range(1))
        self.gradients = jax.tree.map(np.asarray, run.moments_of(state))
        self.shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
        state, second = self.go_on(state, range(1, run.SAVED_AT))
        self.saved = jax.device_get(state)
        self.checkpoints.save(
            run.SAVED_AT, state, data_position={}, config=self.config, metrics=None
        )
        state, third = self.go_on(state, range(run.SAVED_AT, run.STEPS))
        self.checkpoints.finish()
        self.losses = first + second + third

    def go_on(self, state, steps):
        return run.train(self.step, state, config=self.config, mesh=self.mesh, steps=steps)


@pytest.mark.parametrize(
    ("bottleneck", "pairs"),
    [
        ("fsq", list(zip(MESHES, [*MESHES[1:], MESHES[0]], strict=True))),
        pytest.param("vae", list(itertools.permutations(MESHES, 2)), marks=pytest.mark.slow),
    ],
)
def test_thirty_steps_on_any_mesh_and_on_from_one_to_another(bottleneck, pairs, tmp_path):
    """One test, so that parallel workers do not each compile all programs."""
    config = run.config_for(model__bottleneck=bottleneck)
    initial = jax.device_get(run.start(config, run.mesh_for(config)))
    runs = {
        sizes: Run(sizes, initial, folder=tmp_path, model__bottleneck=bottleneck)
        for sizes in MESHES
    }
    one = runs[MESHES[0]]
    assert one.losses[-1] < 0.8 * one.losses[0]  # something was learnt
    for sizes, other in runs.items():
        assert other.losses[0] == pytest.approx(one.losses[0], rel=1e-5), sizes
        run.assert_close_norms(other.gradients, one.gradients, rtol=1e-5, what=sizes)
        assert other.losses == pytest.approx(one.losses, rel=run.TOLERANCE[bottleneck]), sizes
        # What the step returns lies where the state lay.
        stays = jax.tree.map(
            lambda got, want: got.is_equivalent_to(want.sharding, want.ndim),
            other.shardings,
            other.abstract,
        )
        assert all(jax.tree.leaves(stays)), sizes

    for saver, reader in pairs:
        state, _ = runs[saver].checkpoints.restore(run.SAVED_AT, runs[reader].abstract)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), runs[saver].saved)
        _, losses = runs[reader].go_on(state, range(run.SAVED_AT, run.STEPS))
        want = one.losses[run.SAVED_AT :]
        assert losses == pytest.approx(want, rel=run.TOLERANCE[bottleneck]), (saver, reader)
    for other in runs.values():
        other.checkpoints.close()


def test_shards_that_are_no_whole_blocks(tmp_path):
    """4 blocks of 16 tokens in 8 shards: a step has the loss and gradients of one device."""
    results = {}
    for sizes in ("1x1x1x1", "1x1x1x8"):
        config = run.config_for(sizes, data__sequence_blocks=4)
        mesh = run.mesh_for(config)
        state = run.start(config, mesh)
        state, (loss,) = run.train(
            run.jitted_step(config, mesh), state, config=config, mesh=mesh, steps=range(1)
        )
        results[sizes] = loss, jax.tree.map(np.asarray, run.moments_of(state))
    (want_loss, want), (loss, gradients) = results.values()
    assert loss == pytest.approx(want_loss, rel=1e-5)
    run.assert_close_norms(gradients, want, rtol=1e-5, what="8 shards of 4 blocks")


@pytest.mark.parametrize("every", [1, 2, 3])
def test_frames_that_lpips_looks_at_are_those_of_one_device(every):
    drawn = {}
    for sizes in ("1x1x1x1", "2x2x1x2", "1x1x1x8"):
        config = run.config_for(
            sizes, loss__lpips_every_blocks=every, data__batch_size=4, data__sequence_blocks=4
        )
        tokens = 4 * block_tokens(config)
        patches = np.random.default_rng(0).random((4, tokens, 8 * 8 * 3), np.float32)
        segments = np.ones((4, tokens), np.int32)
        segments[1:, -block_tokens(config) :] = 0
        patches, segments = jax.device_put(
            (patches, segments), batch_sharding(run.mesh_for(config))
        )
        codec = codec_of(config)
        draw = partial(
            frames_for_perceptual_loss,
            every_blocks=every,
            block_frames=codec.geometry.frames,
            unpack=codec.unpack,
        )
        (frames,), weights = jax.jit(
            lambda patches, segments, draw=draw, codec=codec: draw(
                jax.random.key(1),
                np.arange(4),
                (patches,),
                segments[:, :: codec.geometry.inputs] != 0,
            )
        )(patches, segments)
        drawn[sizes] = np.asarray(frames), np.asarray(weights)
    (want, want_weights), *others = drawn.values()
    for frames, weights in others:
        np.testing.assert_array_equal(frames, want)
        np.testing.assert_array_equal(weights, want_weights)
