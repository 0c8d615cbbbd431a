"""The training step against independent arithmetic.

Dimension key: B batch, S tokens, D values a patch, N blocks, L tokens a block, F frames.
"""

import functools
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastictok_jax.config import apply_overrides, resolve_config
from elastictok_jax.experiment_registry import get_experiment
from elastictok_jax.layers.patching import patchify, unpatchify
from elastictok_jax.losses.perceptual import frames_for_perceptual_loss
from elastictok_jax.masking import keep_mask
from elastictok_jax.models.elastictok.model import build_elastictok_model
from elastictok_jax.perceptual.lpips import lpips
from elastictok_jax.perceptual.lpips_weights import load_lpips
from elastictok_jax.training.optimizer import decayed_parameters, make_schedule
from tests.tiny import codec_of, made_up_state, make_train_step

F, SIDE, PATCH = 4, 16, (2, 8, 8)
L, D = 8, 2 * 8 * 8 * 3
BLOCKS = 2
# The arithmetic is what is tested here; unoptimised code for it compiles faster.
QUICK = {"xla_backend_optimization_level": 0}
# Row 0 is full, row 1 ends in a block of padding, row 2 is padding alone, row 3 has two clips.
SEGMENTS_BS = np.repeat(np.array([[1, 1], [1, 0], [0, 0], [1, 2]], np.int32), L, axis=1)


def tiny(**overrides):
    config = get_experiment("quickstart")
    base = {
        "model.width": 16,
        "model.mlp_width": 32,
        "model.encoder_layers": 1,
        "model.decoder_layers": 1,
        "model.heads": 1,
        "video.resolution": SIDE,
        "masking.min_tokens": 1,
        "loss.lpips_weight": 0.0,
        "optimizer.learning_rate": 1e-3,
        "optimizer.warmup_steps": 0,
        "optimizer.schedule": "constant",
        "optimizer.ema_decay": 0.0,
        "data.batch_size": 4,
        "data.sequence_blocks": BLOCKS,
    }
    apply_overrides(
        config, base | {key.replace("__", "."): value for key, value in overrides.items()}
    )
    return resolve_config(config)


def some_batch(seed: int = 0):
    rng = np.random.default_rng(seed)
    patches_BSD = rng.integers(0, 256, (4, BLOCKS * L, D), dtype=np.uint8)
    return {"patches": jnp.asarray(patches_BSD), "segment_ids": jnp.asarray(SEGMENTS_BS)}


@functools.cache
def initial(bottleneck: str, vae_dim: int):
    config = tiny(model__bottleneck=bottleneck, model__vae_dim=vae_dim)
    return made_up_state(config)


def start_of(config):
    """The state at step 0 of `tiny` with this config's bottleneck, and no EMA."""
    return initial(config.model.bottleneck, config.model.vae_dim)


def jitted(config, **options):
    return jax.jit(make_train_step(config), compiler_options=QUICK, **options)


def run_step(config, batch):
    return jitted(config)(start_of(config), batch, {})


def assert_close(tree, other, *, rtol: float, atol: float) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), tree, other)


def kept(fraction: float):
    lengths_BN = jnp.full((4, BLOCKS), round(fraction * L), jnp.int32)
    return keep_mask(lengths_BN, tokens_per_block=L)


def to_pixels(patches) -> np.ndarray:
    return np.asarray(patches, np.float64) / 127.5 - 1.0


@pytest.mark.parametrize("bottleneck", ["fsq", "vae"])
def test_microbatches_add_up_to_the_batch(bottleneck):
    batch, results = some_batch(), {}
    for pieces in (1, 2, 4):
        config = tiny(model__bottleneck=bottleneck, optimizer__accumulate_steps=pieces)
        results[pieces] = run_step(config, batch)
    whole, metrics = results[1]
    for pieces in (2, 4):
        state, cut_metrics = results[pieces]
        assert cut_metrics.keys() == metrics.keys()
        assert_close(cut_metrics, metrics, rtol=1e-6, atol=1e-6)
        # AdamW's first moment after one step is (1 - b1) times the clipped gradient.
        moments, expected = (s.opt_state["model"][1][0].mu for s in (state, whole))
        assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected)) > 1e-3
        assert_close(moments, expected, rtol=1e-4, atol=1e-7)
        # AdamW's first step is the sign of the gradient: where that is not mere rounding, the
        # weights agree too (they move by the learning rate, 1e-3).
        jax.tree.map(
            lambda a, b, moment: np.testing.assert_allclose(
                a[abs(moment) > 1e-6], b[abs(moment) > 1e-6], rtol=0, atol=1e-5
            ),
            *jax.tree.map(np.asarray, (state.params["model"], whole.params["model"], expected)),
        )


def test_weight_decay_touches_kernels_alone():
    batch = some_batch()
    rate, decay = 1e-3, 0.5
    start = start_of(tiny()).params
    without, _ = run_step(tiny(optimizer__weight_decay=0.0), batch)
    with_decay, _ = run_step(tiny(optimizer__weight_decay=decay), batch)
    names = set()
    leaves = [
        jax.tree_util.tree_leaves_with_path(params)
        for params in (start, without.params, with_decay.params)
    ]
    for (path, first), (_, off), (_, on) in zip(*leaves, strict=True):
        names.add(path[-1].key)
        if path[-1].key == "kernel":
            np.testing.assert_allclose(off - on, rate * decay * first, rtol=1e-3, atol=1e-7)
            assert (off != on).any()
        else:
            np.testing.assert_array_equal(off, on)
            assert (off != first).any(), "a weight that nothing trains proves nothing"
    assert names >= {"kernel", "kept_embed", "dropped_embed"}
    assert len(names) >= 4  # and the norms'
    assert sum(jax.tree.leaves(decayed_parameters(start))) == sum(
        p[-1].key == "kernel" for p, _ in leaves[0]
    )


def schedule_of(config):
    return make_schedule(config.optimizer, config)


def test_schedules():
    peak, warmup, steps, final = 2e-3, 10, 50, 0.1
    keys = dict(
        optimizer__learning_rate=peak,
        optimizer__warmup_steps=warmup,
        optimizer__final_fraction=final,
        train__steps=steps,
    )
    cosine = schedule_of(tiny(optimizer__schedule="cosine", **keys))
    constant = schedule_of(tiny(optimizer__schedule="constant", **keys))
    for step in (0, 1, 5, 9, 10, 11, 30, 49, 50, 80):
        if step < warmup:
            expected = constant_expected = peak * step / warmup
        else:
            done = min(1.0, (step - warmup) / (steps - warmup))
            share = 0.5 * (1 + math.cos(math.pi * done))
            expected, constant_expected = peak * (final + (1 - final) * share), peak
        assert float(cosine(step)) == pytest.approx(expected, rel=1e-5, abs=1e-9)
        assert float(constant(step)) == pytest.approx(constant_expected, rel=1e-5, abs=1e-9)


def test_ema_and_donation():
    """Two steps of the jitted step as the loop jits it: averages by hand, old buffers gone."""
    decay = 0.15  # less than (1 + 1) / (10 + 1), so that both sides of the minimum are taken
    config = tiny(optimizer__ema_decay=decay)
    step = jitted(config, donate_argnums=0)
    start = start_of(config)
    state = jax.tree.map(jnp.copy, start.replace(ema_params=start.params))
    average = jax.tree.map(np.array, state.params)
    for number, memory in ((0, 0.1), (1, decay)):
        old = state
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*donated buffers were not usable")
            state, metrics = step(old, some_batch(number), {})
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
        average = jax.tree.map(
            lambda mean, value, memory=memory: memory * mean + (1 - memory) * np.asarray(value),
            average,
            state.params,
        )
        assert_close(state.ema_params, average, rtol=1e-5, atol=1e-7)
        assert int(state.step) == number + 1
        assert np.isfinite(float(metrics["loss"]))
    gaps = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state.ema_params, state.params)
    assert max(jax.tree.leaves(gaps)) > 1e-5


def test_mse_is_of_valid_pixels_alone():
    config = tiny(masking__kind="fixed", masking__fraction=1.0)
    batch = some_batch()
    state = start_of(config)
    step = jitted(config)
    new_state, metrics = step(state, batch, {})

    keep_BS, places = kept(1.0), codec_of(config).row_layout(batch["segment_ids"])
    target_BSD = to_pixels(batch["patches"])
    output = build_elastictok_model(config).apply(
        {"params": state.params["model"]}, jnp.asarray(target_BSD, jnp.float32), keep_BS, places
    )
    error_BSD = (np.asarray(output.reconstruction, np.float64) - target_BSD) ** 2
    expected = error_BSD[SEGMENTS_BS != 0].mean()
    assert float(metrics["mse"]) == pytest.approx(expected, rel=1e-5)
    assert float(metrics["loss"]) == float(metrics["mse"])
    assert error_BSD.mean() != pytest.approx(expected, rel=1e-4)  # padding would have shown
    assert float(metrics["kept_fraction"]) == 1.0
    assert float(metrics["padding_fraction"]) == pytest.approx(3 / 8)

    # What stands in the padding changes neither the loss nor any weight.
    garbage = np.where(SEGMENTS_BS[..., None] == 0, 255 - batch["patches"], batch["patches"])
    other, _ = step(state, {**batch, "patches": garbage}, {})
    jax.tree.map(np.testing.assert_array_equal, other.params, new_state.params)


def test_vae_kl_sums_over_kept_tokens_and_averages_over_blocks():
    weight = 1e-2
    config = tiny(
        model__bottleneck="vae",
        model__vae_dim=4,
        masking__kind="fixed",
        masking__fraction=0.5,
        loss__kl_weight=weight,
    )
    batch = some_batch()
    state = start_of(config)
    new_state, metrics = run_step(config, batch)

    keep_BS, places = kept(0.5), codec_of(config).row_layout(batch["segment_ids"])
    encoded_BSZ = build_elastictok_model(config).apply(
        {"params": state.params["model"]},
        jnp.asarray(to_pixels(batch["patches"]), jnp.float32),
        keep_BS,
        places,
        method=lambda model, *args: model.encoder(*args),
    )
    mean, log_variance = np.split(np.asarray(encoded_BSZ, np.float64), 2, axis=-1)
    assert mean.shape == (4, BLOCKS * L, 4)
    kl_BS = (-0.5 * (1 + log_variance - mean**2 - np.exp(log_variance))).sum(-1)
    kl_BNL = np.where(SEGMENTS_BS != 0, kl_BS, 0.0).reshape(4, BLOCKS, L)
    valid_blocks = 5
    expected = kl_BNL[:, :, : L // 2].sum() / valid_blocks
    assert float(metrics["kl"]) == pytest.approx(expected, rel=1e-4)
    assert expected > 0.1
    assert float(metrics["loss"]) == pytest.approx(
        float(metrics["mse"]) + weight * expected, rel=1e-5
    )
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), state.params, new_state.params)
    assert all(jax.tree.leaves(moved))


def test_masks_and_noise_follow_seed_and_step():
    """The same state gives the same step, bit for bit; another seed or step another one."""
    batch = some_batch()
    config, other = tiny(model__bottleneck="vae"), tiny(model__bottleneck="vae", seed=1)
    state = start_of(config)
    step = jitted(config)
    first, again = (step(state, batch, {})[1] for _ in range(2))
    later = step(state.replace(step=state.step + 1), batch, {})[1]
    reseeded = jitted(other)(state, batch, {})[1]
    assert all(float(first[key]) == float(again[key]) for key in first)
    for changed in (later, reseeded):
        assert float(changed["mse"]) != float(first["mse"])
        assert float(changed["kept_fraction"]) != float(first["kept_fraction"])


def frames_of(config, key, rows, videos, valid_BN):
    return frames_for_perceptual_loss(
        *(key, rows, videos, jnp.asarray(valid_BN)),
        every_blocks=config.loss.lpips_every_blocks,
        block_frames=F,
        unpack=codec_of(config).unpack,
    )


@pytest.mark.parametrize("every", [1, 2, 3, 9])
def test_frames_that_lpips_looks_at_stand_for_all_frames_of_valid_blocks(every):
    """For any number of blocks a frame: the mean over draws of the weighted sum over drawn frames
    is the sum over valid blocks of the mean over their frames."""
    rows, blocks, draws = 4, 4, 400
    config = tiny(loss__lpips_every_blocks=every, data__sequence_blocks=blocks)
    valid_BN = np.array([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0], [0, 2, 3, 0]], np.int32)
    # Every pixel of a frame says which frame of the batch it is.
    number_BT = np.arange(rows * blocks * F).reshape(rows, -1)
    video = np.broadcast_to(number_BT[..., None, None, None], (rows, blocks * F, SIDE, SIDE, 3))
    patches_BSD = jnp.asarray(patchify(video, patch=PATCH, frames_per_block=F), jnp.float32)

    def draw(key):
        videos = patches_BSD, -patches_BSD
        (one, other), weight = frames_of(config, key, jnp.arange(rows), videos, valid_BN > 0)
        return one[:, :, 0, 0, 0], jnp.ptp(one, axis=(2, 3, 4)), jnp.abs(one + other).max(), weight

    numbers_KBG, spread, differ, weight_KBG = jax.jit(jax.vmap(draw))(
        jax.random.split(jax.random.key(0), draws)
    )
    assert not np.any(spread) and not np.any(differ)  # one frame, the same of both videos
    runs = -(-blocks // min(every, blocks))
    assert numbers_KBG.shape == (draws, rows, runs)
    weights = np.asarray(weight_KBG[0])
    assert (weight_KBG == weights).all() and weights.sum() == (valid_BN > 0).sum()
    numbers = np.asarray(numbers_KBG[:, weights > 0], np.int64)
    valid_frames = np.flatnonzero(np.repeat(valid_BN.ravel(), F))
    assert set(numbers.ravel()) == set(valid_frames)  # each is drawn, and none of padding
    values = np.random.default_rng(0).normal(size=number_BT.size)  # some function of frames
    sums_K = (values[numbers] * weights[weights > 0]).sum(axis=1)
    standard_error = sums_K.std() / np.sqrt(draws)
    assert abs(sums_K.mean() - values[valid_frames].sum() / F) < 4 * standard_error


def test_frames_that_lpips_looks_at_follow_the_global_row():
    """So that microbatches, meshes and hosts see the same."""
    config = tiny(loss__lpips_every_blocks=2, data__sequence_blocks=4)
    patches_BSD = np.random.default_rng(0).random((4, 4 * L, D), np.float32)
    valid_BN = np.ones((4, 4), bool)

    def draw(rows):
        key = jax.random.key(3)
        (frames,), weights = frames_of(config, key, rows, (patches_BSD[rows],), valid_BN[rows])
        return frames, weights

    complete, rows = draw(np.arange(4)), np.array([1, 3])
    for part, whole in zip(draw(rows), complete, strict=True):
        np.testing.assert_array_equal(part, whole[rows])


def test_lpips_compares_one_frame_of_a_block_and_ignores_padding():
    config = tiny(
        masking__kind="fixed", masking__fraction=1.0, loss__lpips_weight=0.1, data__batch_size=2
    )
    lpips_params = load_lpips("alex")
    segments_BS = np.repeat(np.array([[1, 0], [0, 0]], np.int32), L, axis=1)
    patches_BSD = np.random.default_rng(3).integers(0, 256, (2, BLOCKS * L, D), dtype=np.uint8)
    # Frames far apart in brightness, so that no two distances are alike.
    patches_BSD[0, : L // 2] //= 4
    state = start_of(config)
    step = jitted(config)

    def metrics_of(patches_BSD):
        batch = {"patches": jnp.asarray(patches_BSD), "segment_ids": jnp.asarray(segments_BS)}
        return {key: float(value) for key, value in step(state, batch, lpips_params)[1].items()}

    metrics = metrics_of(patches_BSD)
    assert metrics["loss"] == pytest.approx(metrics["mse"] + 0.1 * metrics["lpips"], rel=1e-6)

    garbage = patches_BSD.copy()
    garbage[segments_BS == 0] = 255 - garbage[segments_BS == 0]
    assert metrics_of(garbage) == metrics

    batch = {"patches": jnp.asarray(patches_BSD), "segment_ids": jnp.asarray(segments_BS)}
    target_BSD = jnp.asarray(to_pixels(patches_BSD), jnp.float32)
    everything, places = (
        jnp.ones((2, BLOCKS * L), bool),
        codec_of(config).row_layout(batch["segment_ids"]),
    )
    apply = jax.jit(
        lambda *x: build_elastictok_model(config).apply(*x, everything, places).reconstruction
    )
    reconstruction_BSD = apply({"params": state.params["model"]}, target_BSD)
    frames = [
        unpatchify(x[0, :L], patch=PATCH, frames_per_block=F, height=SIDE, width=SIDE)
        for x in (reconstruction_BSD, target_BSD)
    ]
    distances_F = np.asarray(jax.jit(functools.partial(lpips, net="alex"))(lpips_params, *frames))
    matches = np.isclose(distances_F, metrics["lpips"], rtol=1e-3)
    assert matches.sum() == 1, (distances_F, metrics["lpips"])
