"""Targets on real footage by a trained model: none that can be reached is missed (slow)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastictok_jax import ElasticTokenizer, Tokens
from elastictok_jax.data import media
from elastictok_jax.data.sources.file_source import EMBEDDED
from elastictok_jax.experiment_registry import get_experiment
from elastictok_jax.layers.attention.api import SequenceLayout
from elastictok_jax.layers.patching import patchify
from elastictok_jax.tokenizer.search import SEARCHES
from elastictok_jax.training.loop import train_experiment

pytestmark = pytest.mark.slow
STEPS, SIDE, LENGTH, LOW = 400, 64, 128, 8
TARGETS = (0.03, 0.045, 0.06, 0.09)
FILES = ("bbb_busy_flight", "bbb_kite", "bbb_static_skyline", "bbb_stream", "city_busy")
CHECKED = sorted(set(SEARCHES) - {"regression", "verified_regression"})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained") / "run"
    config = get_experiment("quickstart")
    config.train.steps = config.train.eval_every = config.train.checkpoint_every = STEPS
    train_experiment(config, workdir=workdir)
    return ElasticTokenizer.from_pretrained(workdir)


@pytest.fixture(scope="module")
def clips():
    """At least 500 blocks: two by three tiles of each held-out video."""
    clips = {}
    for name in FILES:
        path = EMBEDDED / "heldout" / f"{name}.mp4"
        frames = media.read_frames(path, count=min(72, media.probe(path).frames), side=2 * SIDE)
        clips[name] = media.center_crop(frames, height=2 * SIDE, width=3 * SIDE)
    return clips


def block_errors(decoded, clip):
    """float64 [N] of each block and tile, by numpy alone."""
    error = ((decoded.astype(np.float64) - clip) / 127.5) ** 2
    return np.asarray(
        [
            error[t : t + 4, y : y + SIDE, x : x + SIDE].mean()
            for t in range(0, len(clip), 4)
            for y in (0, SIDE)
            for x in (0, SIDE, 2 * SIDE)
        ]
    )


@pytest.mark.parametrize("search", CHECKED)
def test_no_reachable_target_is_missed(tokenizer, clips, tmp_path, search):
    blocks = 0
    targets = TARGETS if search in ("binary", "hybrid") else TARGETS[1:2]
    for target in targets:
        for clip in clips.values():
            tokens = tokenizer.encode(clip, max_mse=target, search=search)
            tokens.save(tmp_path / "clip.etok")
            stored = Tokens.load(tmp_path / "clip.etok")
            error = block_errors(tokenizer.decode(stored), clip)
            np.testing.assert_allclose(error, stored.mse, rtol=1e-5)
            assert (error[stored.met] <= target * (1 + 1e-6)).all()
            assert (error[~stored.met] > target * (1 - 1e-6)).all()
            missed = np.flatnonzero(~stored.met)
            for index in missed[
                :: max(1, len(missed) // 8)
            ]:  # all tokens in its place miss as well
                tile, lengths = index % 6, stored.lengths.copy()
                lengths[index] = LENGTH
                upto = 4 * (index // 6 + 1)
                again = tokenizer.encode(clip[:upto], tokens=lengths[: 6 * (index // 6 + 1)])
                assert again.mse[6 * (index // 6) + tile] > target
            blocks += len(error)
    assert blocks >= 500 * len(targets)


def test_full_is_what_brute_force_finds(tokenizer, clips):
    """A forward pass over the whole clip for every length of every block, with dense attention."""
    model = tokenizer.codec.model
    model = model.clone(spec=dataclasses.replace(model.spec, attention="dense"))
    checked = 0

    @jax.jit
    def errors(params, patches, keep):
        count, tokens = keep.shape
        places = SequenceLayout(jnp.arange(tokens), jnp.ones((count, tokens), jnp.int32), LENGTH)
        pixels = jnp.broadcast_to(patches / 127.5 - 1.0, (count, *patches.shape))
        out = model.apply({"params": params}, pixels, keep, places).reconstruction
        levels = jnp.round((jnp.clip(out[:, -LENGTH:], -1, 1) + 1) * 127.5)
        return jnp.mean(((levels - patches[-LENGTH:]) / 127.5) ** 2, axis=(1, 2))

    for name, whole in clips.items():
        clip = whole[20:36, 20 : 20 + SIDE, 30 : 30 + SIDE]
        patches = patchify(clip, patch=(2, 8, 8), frames_per_block=4).astype(np.float32)
        for target in TARGETS:
            found = tokenizer.encode(clip, max_mse=target, search="full")
            chosen: list[int] = []
            for block in range(4):
                keep = np.zeros((LENGTH - LOW + 1, LENGTH * (block + 1)), bool)
                for earlier, length in enumerate(chosen):
                    keep[:, earlier * LENGTH : earlier * LENGTH + length] = True
                for row, length in enumerate(range(LOW, LENGTH + 1)):
                    keep[row, block * LENGTH : block * LENGTH + length] = True
                curve = np.asarray(errors(tokenizer.params, patches[: LENGTH * (block + 1)], keep))
                length = int(found.lengths[block])
                clear = np.abs(curve / target - 1) > 1e-4  # where rounding cannot decide
                assert not (clear & (curve <= target))[: length - LOW].any(), (name, target, block)
                if found.met[block]:
                    assert curve[length - LOW] <= target * (1 + 1e-4)
                else:
                    assert not (clear & (curve <= target)).any()
                    assert curve[length - LOW] <= curve.min() * (1 + 1e-4)
                chosen.append(length)
                checked += 1
    assert checked == 5 * 4 * 4
