"""Held-out error during training, at fixed shares of tokens."""

from collections.abc import Callable, Sequence

import jax
import ml_collections
import numpy as np

from elastictok_jax.data.pipeline import BatchReader, read_ahead
from elastictok_jax.data.sources import Feeds, has_held_out
from elastictok_jax.models.bottlenecks import codebook_statistics
from elastictok_jax.models.patching import to_uint8, unpatchify

FRACTIONS = (1.0, 0.5, 0.25)  # shares of a block's tokens


def open_held_out(
    config: ml_collections.ConfigDict, feeds: Feeds, *, rows: range, blocks: range
) -> list[dict[str, np.ndarray]]:
    """The held-out batches, the same at every evaluation; empty if nothing is to be held out."""
    if not has_held_out(config):
        return []
    reader = BatchReader(config, feeds, split="heldout", rows=rows, blocks=blocks)
    return list(read_ahead(reader, start=0, stop=config.evaluation.batches))


def evaluate(
    eval_step: Callable,
    params,
    batches: Sequence[dict[str, np.ndarray]],
    *,
    place: Callable[[dict[str, np.ndarray]], dict[str, jax.Array]],
    config: ml_collections.ConfigDict,
    show: Callable[[str, np.ndarray], None] | None,
) -> dict[str, float]:
    """MSE over `batches`, each put on the devices by `place`, and use of the codebook.

    `show`, if given, gets a picture: the first frames, original and at each share of tokens.
    """
    results: dict[str, float] = {}
    columns = [_first_frames(batches[0]["patches"], config)] if batches and show else []
    for fraction in FRACTIONS if batches else ():
        sums = []
        for index, batch in enumerate(batches):
            share = jax.device_put(np.float32(fraction))
            metrics, reconstruction = eval_step(params, place(batch), share)
            sums.append(metrics)
            if index == 0 and show:
                columns.append(_first_frames(np.asarray(to_uint8(reconstruction)), config))
        total = jax.tree.map(lambda *values: np.sum(values, axis=0), *jax.device_get(sums))
        suffix = "" if fraction == 1 else f"_at_{fraction:g}"
        results[f"eval/mse{suffix}"] = float(total["error"] / total["tokens"])
        if fraction == 1 and "codebook_counts" in total:
            statistics = codebook_statistics(total["codebook_counts"])
            results |= {f"eval/codebook_{name}": value for name, value in statistics.items()}
    if columns and show:
        show("eval/original_and_all_half_quarter_tokens", np.concatenate(columns, axis=1))
    return results


def _first_frames(patches_BSD: np.ndarray, config: ml_collections.ConfigDict) -> np.ndarray:
    """The first frame of each row, one below the other: uint8 [B R, R, 3]."""
    side = config.video.resolution
    video = unpatchify(
        patches_BSD,
        patch=tuple(config.model.patch),
        frames_per_block=config.video.frames_per_block,
        height=side,
        width=side,
    )
    return np.concatenate(list(video[:, 0]), axis=0)
