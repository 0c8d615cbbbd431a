"""Held-out error during training: at fixed shares of tokens, and how few of them meet a target."""

import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from elastictok_jax.config import block_tokens
from elastictok_jax.data.pipeline import BatchReader, Part, read_ahead
from elastictok_jax.data.sources.splits import SourceSplits, has_held_out
from elastictok_jax.errors import UsageError
from elastictok_jax.layers.bottlenecks import codebook_statistics
from elastictok_jax.layers.patching import to_uint8, unpatchify

FRACTIONS = (1.0, 0.5, 0.25, 0.125, 0.0625)  # shares of a block's tokens
PICTURED = 3  # of these, the first, in the picture
STEP_COST = 3  # of a training step in forward passes: forward, and twice that backward
PICTURE_ROWS = 8  # of a batch, in the picture


def open_held_out(
    config: ml_collections.ConfigDict, feeds: SourceSplits, *, part: Part
) -> list[dict[str, np.ndarray]]:
    """The held-out batches, the same at every evaluation; empty if nothing is to be held out.

    `evaluation.batches`, or as many as leave evaluation within `evaluation.max_cost` of the
    training's operations: at least one.
    """
    if not has_held_out(config):
        return []
    reader = BatchReader(config, feeds, split="heldout", part=part)
    forward_passes = config.evaluation.max_cost * STEP_COST * config.train.eval_every
    afforded = max(1, int(forward_passes / len(fractions_of(config))))
    return list(read_ahead(reader, start=0, stop=min(config.evaluation.batches, afforded)))


def evaluate(
    eval_step: Callable,
    params,
    batches: Sequence[dict[str, np.ndarray]],
    *,
    place: Callable[[dict[str, np.ndarray]], dict[str, jax.Array]],
    draw: Callable[[jax.Array], jax.Array],
    show: Callable[[str, np.ndarray], None] | None,
    config: ml_collections.ConfigDict,
) -> dict[str, float]:
    """MSE over `batches`, each put on the devices by `place`, at each of `fractions_of(config)`,
    and use of the codebook at the first; for each of `evaluation.targets`, the share of blocks that
    one of them brings to that MSE, and the mean of the fewest tokens that do, or of all.

    `show`, if given, gets a picture: the first frames, original and at each share of tokens, which
    `draw`, `make_first_frames` jitted, makes whole on every device. All processes must call this.
    """
    start = time.perf_counter()
    results: dict[str, float] = {}
    block_errors = []
    columns = [np.asarray(draw(place(batches[0])["patches"]))] if batches and show else []
    fractions = fractions_of(config)
    for rank, fraction in enumerate(fractions if batches else ()):
        sums = []
        for index, batch in enumerate(batches):
            metrics, reconstruction = eval_step(params, place(batch), np.float32(fraction))
            sums.append(metrics)
            if index == 0 and show and rank < PICTURED:
                columns.append(np.asarray(draw(reconstruction)))
        read = jax.device_get(sums)
        block_errors.append(np.concatenate([some.pop("block_error").reshape(-1) for some in read]))
        total = jax.tree.map(lambda *values: np.sum(values, axis=0), *read)
        suffix = "" if fraction == fractions[0] else f"_at_{fraction:g}"
        results[f"eval/mse{suffix}"] = float(total["error"] / total["tokens"])
        if not suffix and "codebook_counts" in total:
            statistics = codebook_statistics(total["codebook_counts"])
            results |= {f"eval/codebook_{name}": value for name, value in statistics.items()}
    if batches:
        tokens_K = np.maximum(1, np.round(np.asarray(fractions) * block_tokens(config)))
        results |= thresholds(np.stack(block_errors), tokens_K, config.evaluation.targets)
        results["eval/seconds"] = time.perf_counter() - start
    if columns and show:
        show("eval/original_and_all_half_quarter_tokens", np.concatenate(columns, axis=1))
    return results


def fractions_of(config: ml_collections.ConfigDict) -> tuple[float, ...]:
    """Shares of a block's tokens that are evaluated: FRACTIONS, or the one trained for."""
    return (config.masking.fraction,) if config.masking.kind == "fixed" else FRACTIONS


def require_best_metric(config: ml_collections.ConfigDict) -> None:
    """Raises UsageError unless `train.best_metric` is one that evaluations have, and that says
    which of two checkpoints is better."""
    names = ["eval/mse", *(f"eval/mse_at_{fraction:g}" for fraction in fractions_of(config)[1:])]
    for target in config.evaluation.targets:
        names += [f"eval/met_at_mse_{target:g}", f"eval/tokens_at_mse_{target:g}"]
    if config.train.best_metric not in names:
        raise UsageError(
            f"train.best_metric = {config.train.best_metric!r}: choose one of {', '.join(names)}"
        )


def thresholds(
    errors_KN: np.ndarray, tokens_K: np.ndarray, targets: Sequence[float]
) -> dict[str, float]:
    """For each target the share of blocks that meet it with one of the K numbers of tokens, and the
    mean of the fewest that do, or of the most where none does.

    Args:
      errors_KN: of each block, nan for padding.
    """
    errors_KN = errors_KN[:, ~np.isnan(errors_KN[0])]
    results = {}
    for target in targets:
        met_KN = errors_KN <= target
        fewest_N = np.where(met_KN, tokens_K[:, None], tokens_K.max()).min(axis=0)
        results[f"eval/met_at_mse_{target:g}"] = float(met_KN.any(axis=0).mean())
        results[f"eval/tokens_at_mse_{target:g}"] = float(fewest_N.mean())
    return results


def make_first_frames(config: ml_collections.ConfigDict) -> Callable[[jax.Array], jax.Array]:
    """first_frames(patches uint8, or float in [-1, 1], [B, S, D]): the first frame of the first
    rows, one below the other, uint8 [rows R, R, 3]."""
    side, per_block = config.video.resolution, block_tokens(config)

    def first_frames(patches_BSD: jax.Array) -> jax.Array:
        patches_BLD = patches_BSD[:PICTURE_ROWS, :per_block]
        if patches_BLD.dtype != jnp.uint8:
            patches_BLD = to_uint8(patches_BLD)
        video = unpatchify(
            patches_BLD,
            patch=tuple(config.model.patch),
            frames_per_block=config.video.frames_per_block,
            height=side,
            width=side,
        )
        return video[:, 0].reshape(-1, side, 3)

    return first_frames
