"""What every model family must do, as checks of a resolved config with batches of 2 rows.

`test_conformance.py` runs them for each registered family, and shows that planted faults fail.

Dimension key: B rows, N blocks of a row, P inputs and D values an input of a block, S = N P.
"""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from elastictok_jax import ElasticTokenizer, Tokens
from elastictok_jax.aot.programs import programs
from elastictok_jax.config import apply_overrides, resolve_config
from elastictok_jax.evaluation.eval_clips import EvaluationOverrides
from elastictok_jax.evaluation.evaluate import evaluate_models
from elastictok_jax.models.base import StepKeys
from elastictok_jax.models.registry import family_of_config
from elastictok_jax.parallel.sharding import batch_sharding, replicate, with_logical_axes
from elastictok_jax.tokenizer.search import SEARCHES
from elastictok_jax.training.host_consensus import Votes
from elastictok_jax.training.loop import train_experiment
from elastictok_jax.training.metric_writers import read_metrics
from tests.tiny import abstract_state, jit_train_step, mesh_of, sharded_init

TIMES = {"step_seconds", "tokens_per_second", "model_flop_utilisation", "wait_fraction"}


def changed(config, **overrides):
    """Returns the config with other values; `__` stands for a dot."""
    config = ml_collections.ConfigDict(config.to_dict())
    apply_overrides(config, {key.replace("__", "."): value for key, value in overrides.items()})
    return resolve_config(config)


def random_batch(config, *, seed: int = 0):
    """Returns 2 rows: one clip and padding; two clips."""
    geometry = family_of_config(config).codec.geometry
    shape = (2, geometry.row_inputs, geometry.input_values)
    segments_BN = np.ones((2, geometry.window), np.int32)
    segments_BN[0, -1] = 0
    segments_BN[1, 1:] = 2
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return {"patches": pixels, "segment_ids": segments_BN.repeat(geometry.inputs, axis=1)}


def random_clip(config, *, blocks: int, extra_frames: int = 0):
    """Returns frames uint8 [T, R, R, 3] that change slowly."""
    geometry = family_of_config(config).codec.geometry
    rng = np.random.default_rng(blocks)
    coarse = rng.integers(0, 256, (1, geometry.side // 4, geometry.side // 4, 3))
    frames = blocks * geometry.frames + extra_frames
    drift = np.arange(frames)[:, None, None, None] * rng.integers(-3, 4, coarse.shape)
    return np.clip(coarse + drift, 0, 255).astype(np.uint8).repeat(4, axis=1).repeat(4, axis=2)


def initial_state(config):
    """Returns the state at step 0."""
    return sharded_init(config, abstract_state(config, mesh_of(config)))


def tokenizer_of(config):
    """Returns a tokenizer with initial weights."""
    group = family_of_config(config).task.groups[0]
    return ElasticTokenizer(config, initial_state(config).params[group])


def check_clips_do_not_see_each_other(config) -> None:
    """Changing all pixels of one clip changes no bit of another, in its row or in others."""
    task, batch = family_of_config(config).task, random_batch(config)
    params, frozen = initial_state(config).params, task.frozen()
    step = jax.jit(task.evaluate)

    def made(patches):
        given = batch | {"patches": patches}
        return np.asarray(step(params, frozen, given, np.float32(task.points[0]))[1])

    before, segments_BS = made(batch["patches"]), batch["segment_ids"]
    for row, segment in ((0, 1), (1, 1), (1, 2)):
        clip_BS = (segments_BS == segment) & (np.arange(2)[:, None] == row)
        others_BS = (segments_BS != 0) & ~clip_BS
        after = made(np.where(clip_BS[..., None], 255 - batch["patches"], batch["patches"]))
        assert (after[clip_BS] != before[clip_BS]).any()
        np.testing.assert_array_equal(after[others_BS], before[others_BS])


def check_microbatches_add_up(config) -> None:
    """Losses and gradients of single rows, with the totals of the batch, sum to those of both."""
    task = family_of_config(config).task
    batch = jax.tree.map(jnp.asarray, random_batch(config))
    params, frozen, totals = initial_state(config).params, task.frozen(), task.totals(batch)
    for group in task.groups:

        @jax.jit
        def gradients(batch, rows_B, group=group):
            def loss(tree):
                shared = dict(frozen=frozen, keys=StepKeys(config.seed, 3), totals=totals)
                return task.loss(group, {**params, group: tree}, batch, rows_B, **shared)

            (total, _), grads = jax.value_and_grad(loss, has_aux=True)(params[group])
            return {"loss": total, "grads": grads}

        both = gradients(batch, jnp.arange(2))
        parts = [
            gradients(jax.tree.map(lambda x, r=r: x[r : r + 1], batch), jnp.arange(r, r + 1))
            for r in range(2)
        ]
        summed = jax.tree.map(jnp.add, *parts)
        largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(both["grads"]))
        assert largest > 0
        for a, b in zip(jax.tree.leaves(summed), jax.tree.leaves(both), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * largest)


def check_what_is_reported_is_decoded(config, tmp_path) -> None:
    """The reported MSE is that of what stored tokens decode to, which is the same every time."""
    tokenizer, geometry = tokenizer_of(config), family_of_config(config).codec.geometry
    clip = random_clip(config, blocks=3, extra_frames=1)
    lengths = [geometry.tokens, 1, max(1, geometry.tokens // 2), geometry.tokens]
    tokens = tokenizer.encode(clip, tokens=lengths)
    assert tokens.lengths.tolist() == lengths
    tokens.save(tmp_path / "clip.etok")
    decoded = tokenizer.decode(Tokens.load(tmp_path / "clip.etok"))
    assert decoded.shape == clip.shape and decoded.dtype == np.uint8
    for start in range(0, len(clip), geometry.frames):
        part = slice(start, start + geometry.frames)
        error = np.mean(((decoded[part].astype(np.float64) - clip[part]) / 127.5) ** 2)
        np.testing.assert_allclose(tokens.mse[start // geometry.frames], error, rtol=1e-5)
    np.testing.assert_array_equal(tokenizer.decode(tokens), decoded)
    streamed = Tokens.join(list(tokenizer.encode_stream(iter(clip), tokens=1)))
    for ours, theirs in zip(streamed.codes, tokenizer.encode(clip, tokens=1).codes, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def check_searches_and_budgets(config) -> None:
    """A search keeps what meets its target, and a budget is spent to the last token."""
    tokenizer, clip = tokenizer_of(config), random_clip(config, blocks=2)
    worst = float(tokenizer.encode(clip, tokens=1).mse.max())
    for search in SEARCHES:
        if "regression" not in search:
            tokens = tokenizer.encode(clip, max_mse=1.01 * worst, search=search)
            assert tokens.met[0] == (tokens.mse[0] <= 1.01 * worst)
    budget = tokenizer.geometry.tokens + 1
    assert tokenizer.encode(clip, total_tokens=budget).num_tokens == budget


def check_resume_is_bitwise(config, tmp_path) -> None:
    """A run that stops and goes on writes the metrics and weights of one that did not."""
    every = dict(train__log_every=1, train__eval_every=2, train__checkpoint_every=2)
    config = changed(config, **every, optimizer__schedule="constant")
    for folder, stops in (("straight", [4]), ("resumed", [2, 4])):
        for steps in stops:
            assert train_experiment(changed(config, train__steps=steps), workdir=tmp_path / folder)
    straight, resumed = (
        [
            {k: v for k, v in line.items() if k not in TIMES and k != "eval/seconds"}
            for line in read_metrics(tmp_path / folder / "metrics.jsonl")
        ]
        for folder in ("straight", "resumed")
    )
    assert resumed == straight
    weights = [
        ElasticTokenizer.from_pretrained(tmp_path / folder) for folder in ("straight", "resumed")
    ]
    assert weights[0].fingerprint == weights[1].fingerprint


def check_any_mesh(config, meshes) -> None:
    """The first step has the same loss and gradient norm on every mesh."""
    results = []
    for sizes in meshes:
        given = changed(config, **{f"mesh__{axis}": size for axis, size in sizes.items()})
        task, mesh = family_of_config(given).task, mesh_of(given)
        abstract = abstract_state(given, mesh)
        sharding, rows = batch_sharding(mesh), given.data.batch_size // 2
        batch = {
            key: jax.device_put(np.tile(value, (rows, *[1] * (value.ndim - 1))), sharding)
            for key, value in random_batch(given).items()
        }
        inputs = (
            batch,
            replicate(task.frozen(), mesh),
            Votes(mesh).cast(stop=False, replaced_blocks=0),
        )
        step = with_logical_axes(jit_train_step(given, abstract), mesh)
        _, metrics = step(sharded_init(given, abstract), *inputs)
        results.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    np.testing.assert_allclose(results[1:], results[:1] * (len(results) - 1), rtol=1e-5)


def check_evaluation(workdir, output) -> None:
    """`elastictok evaluate` measures a trained model of the family."""
    limits = EvaluationOverrides(targets="0.5", max_clips=1, max_blocks=2, search_blocks=0)
    results = evaluate_models([workdir], output=output, limits=limits)
    assert (output / "report.html").is_file()
    assert results["models"][0]["tokens_per_block"] > 0


def check_programs_compile(config) -> None:
    """The programs of `elastictok compile` compile, and say what they cost."""
    for program in programs(config, mesh_of(config, jax.devices()[:1])):
        assert program.lower().compile() is not None
        assert program.model_flops > 0 and program.tokens > 0
