"""Held-out error during training, at fixed shares of tokens."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from elastictok_jax.config import block_tokens
from elastictok_jax.data.pipeline import BatchReader, read_ahead
from elastictok_jax.data.sources import Feeds, has_held_out
from elastictok_jax.models.bottlenecks import codebook_statistics
from elastictok_jax.models.patching import to_uint8, unpatchify

FRACTIONS = (1.0, 0.5, 0.25)  # shares of a block's tokens
PICTURE_ROWS = 8  # of a batch, in the picture


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
    draw: Callable[[jax.Array], jax.Array],
    show: Callable[[str, np.ndarray], None] | None,
) -> dict[str, float]:
    """MSE over `batches`, each put on the devices by `place`, and use of the codebook.

    `show`, if given, gets a picture: the first frames, original and at each share of tokens, which
    `draw`, `make_first_frames` jitted, makes whole on every device. All processes must call this.
    """
    results: dict[str, float] = {}
    columns = [np.asarray(draw(place(batches[0])["patches"]))] if batches and show else []
    for fraction in FRACTIONS if batches else ():
        sums = []
        for index, batch in enumerate(batches):
            metrics, reconstruction = eval_step(params, place(batch), np.float32(fraction))
            sums.append(metrics)
            if index == 0 and show:
                columns.append(np.asarray(draw(reconstruction)))
        total = jax.tree.map(lambda *values: np.sum(values, axis=0), *jax.device_get(sums))
        suffix = "" if fraction == 1 else f"_at_{fraction:g}"
        results[f"eval/mse{suffix}"] = float(total["error"] / total["tokens"])
        if fraction == 1 and "codebook_counts" in total:
            statistics = codebook_statistics(total["codebook_counts"])
            results |= {f"eval/codebook_{name}": value for name, value in statistics.items()}
    if columns and show:
        show("eval/original_and_all_half_quarter_tokens", np.concatenate(columns, axis=1))
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
