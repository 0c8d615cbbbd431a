"""`elastictok train-router`: measures curves with a frozen tokenizer and fits a `Router` to them.

Dimension key: N blocks, K knots.

Blocks come from the tokenizer's own training data as training reads it (frame rate, resolution,
crop and flip of each source), from left to right, with earlier blocks kept at the lengths that a
search for a random target would choose. Everything is a function of the config's seed.
"""

import sys
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from elastictok_jax.data.clip_reader import ClipReader
from elastictok_jax.data.mixture import mixture_item_blocks
from elastictok_jax.data.packing import PackedClip
from elastictok_jax.data.sources.splits import open_splits
from elastictok_jax.errors import UsageError
from elastictok_jax.storage.outputs import require_output_file
from elastictok_jax.storage.references import split_reference
from elastictok_jax.tokenizer.api import ElasticTokenizer
from elastictok_jax.tokenizer.router import (
    FILE,
    Router,
    RouterHead,
    predict_errors,
    router_features_of,
)
from elastictok_jax.tokenizer.search import log_spaced
from elastictok_jax.tokenizer.tiling import TileGrid

KNOTS = 32
CLIP_BLOCKS = 6  # consecutive blocks measured per clip
EPOCHS = 2**20  # epochs from which crops and flips are drawn
HELD_BACK = 5  # one item in five is held back for early stopping
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 1e-2


def train_router(model: str | Path, *, blocks: int, steps: int) -> dict[str, float]:
    """Trains a router and writes it into the folder of `model`.

    Returns:
      blocks: the number measured; steps: the step with the least error on held-back items;
      count_error: the mean relative error of the predicted number of tokens over four targets.

    Raises:
      UsageError: if there is no model, too little data, or the folder cannot be written.
    """
    tokenizer = ElasticTokenizer.without_router(model)
    folder, _ = split_reference(model)
    require_output_file(folder / FILE, change="make the model's folder writable, or copy it")
    lengths = log_spaced(tokenizer.min_tokens, tokenizer.tokens_per_block, count=KNOTS)
    items, features, curves = [], [], []
    for item, block_features, curve_K in _measured_blocks(tokenizer, lengths, blocks=blocks):
        items.append(item)
        features.append(block_features)
        curves.append(curve_K)
        if len(curves) % 100 == 0 or len(curves) == blocks:
            print(f"measured {len(curves)}/{blocks} blocks", file=sys.stderr)
    features_NF, curves_NK = np.stack(features), np.stack(curves)
    held_back = held_back_router_items(items)
    params, best_step = fit_router(
        features_NF, curves_NK, held_back=held_back, steps=steps, seed=tokenizer.config.seed
    )
    Router(params, tuple(lengths), tokenizer.fingerprint).save(folder)
    predicted = np.asarray(predict_errors(params, features_NF[held_back], knots=len(lengths)))
    error = trained_router_count_error(predicted, curves_NK[held_back], lengths)
    return {"blocks": len(curves), "steps": best_step, "count_error": error}


def held_back_router_items(items: Sequence[Hashable]) -> np.ndarray:
    """Returns which blocks belong to held-back items, bool [N].

    An item may be drawn many times, so the split is by item rather than by block.

    Raises:
      UsageError: if all blocks are of one item.
    """
    order = {item: index for index, item in enumerate(dict.fromkeys(items))}
    if len(order) < 2:
        raise UsageError(
            f"the {len(items)} blocks measured are all of one item, and some must be held back: "
            "measure more blocks, or add data"
        )
    return np.asarray([order[item] % HELD_BACK == 0 for item in items])


def _measured_blocks(
    tokenizer: ElasticTokenizer, lengths: list[int], *, blocks: int
) -> Iterator[tuple[tuple[int, int], np.ndarray, np.ndarray]]:
    """Yields (item, features, log errors at `lengths` [K]) of `blocks` blocks of training data."""
    config = tokenizer.config
    rng = np.random.default_rng([config.seed, 1])
    coder = tokenizer.coder("mse")
    count = 0
    for item, video in router_training_clips(config):
        grid = TileGrid(video.shape[:3], tokenizer.geometry)
        target = 0.0
        for frames, inside in zip(*(tiles[0] for tiles in grid.cut(video)), strict=True):
            block = coder.block(frames, inside)
            errors = np.maximum(block.errors(lengths), 1e-12)
            yield item, router_features_of(block), np.log(errors)
            target = target or float(rng.choice(errors))  # met by some length of the first block
            met = np.flatnonzero(errors <= target)
            block.keep(lengths[met[0] if met.size else -1])
            count += 1
            if count == blocks:
                return


def router_training_clips(
    config: ml_collections.ConfigDict,
) -> Iterator[tuple[tuple[int, int], np.ndarray]]:
    """Yields (item, up to CLIP_BLOCKS of its blocks, uint8 [T, R, R, 3]) without end.

    Blocks are read as in training; damaged ones are skipped.

    Raises:
      UsageError: if there is no data, or most of it is damaged.
    """
    feeds = open_splits(config).train
    if not feeds:
        raise UsageError("the data sources have nothing to train a router on")
    rng = np.random.default_rng(config.seed)
    reader = ClipReader(feeds, config, split="train")
    sizes = [
        mixture_item_blocks(feed, frames_per_block=config.video.frames_per_block) for feed in feeds
    ]
    read = failed = 0
    while True:
        index = int(rng.integers(len(feeds)))
        place = int(rng.integers(len(feeds[index].items)))
        item, blocks = int(feeds[index].items[place]), int(sizes[index][place])
        start = int(rng.integers(max(1, blocks - CLIP_BLOCKS + 1)))
        stop = min(blocks, start + CLIP_BLOCKS)
        epoch = int(rng.integers(EPOCHS))  # determines the crop and flip
        pieces = list(
            reader.read(PackedClip(index, item, epoch, start, stop - start), range(start, stop))
        )
        if fault := next((piece.fault for piece in pieces if piece.fault), ""):
            failed += 1
            if failed > 10 + read:
                raise UsageError(f"most of the data cannot be read; the last error: {fault}")
            continue
        read += 1
        yield (index, item), np.concatenate([piece.frames for piece in pieces])


def fit_router(
    features_NF: np.ndarray, curves_NK: np.ndarray, *, held_back: np.ndarray, steps: int, seed: int
) -> tuple[Any, int]:
    """Fits the parameters of a `Router`; also returns the step of least error on `held_back`."""
    train_F, train_K = features_NF[~held_back], curves_NK[~held_back]
    fixed = {
        "center": train_F.mean(axis=0).astype(np.float32),
        "scale": (train_F.std(axis=0) + 1e-3).astype(np.float32),
        "mean": train_K.mean(axis=0).astype(np.float32),
    }
    knots = curves_NK.shape[1]
    key = jax.random.key(seed)
    head = RouterHead(knots).init(key, jnp.zeros((1, features_NF.shape[1])))["params"]
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, steps)
    optimizer = optax.adamw(schedule, weight_decay=WEIGHT_DECAY)

    def loss(head, features, curves):
        error = predict_errors({**fixed, "head": head}, features, knots=knots) - curves
        return jnp.mean(optax.losses.huber_loss(error, delta=0.3))

    @jax.jit
    def step(head, opt_state, index):
        rows = jax.random.randint(jax.random.fold_in(key, index), (128,), 0, len(train_F))
        grads = jax.grad(loss)(head, jnp.asarray(train_F)[rows], jnp.asarray(train_K)[rows])
        updates, opt_state = optimizer.update(grads, opt_state, head)
        return optax.apply_updates(head, updates), opt_state

    opt_state, best, measure = optimizer.init(head), (np.inf, head, 0), jax.jit(loss)
    for index in range(steps):
        head, opt_state = step(head, opt_state, index)
        if (index + 1) % 100 == 0 or index + 1 == steps:
            error = float(measure(head, features_NF[held_back], curves_NK[held_back]))
            if error < best[0]:
                best = (error, head, index + 1)
    params = {**fixed, "head": best[1]}
    return jax.tree.map(np.asarray, params), best[2]


def trained_router_count_error(
    predicted_NK: np.ndarray, curves_NK: np.ndarray, lengths: list[int]
) -> float:
    """Returns the mean relative error of the first length predicted to meet a target.

    Blocks that cannot meet a target are excluded.
    """
    every = np.arange(lengths[0], lengths[-1] + 1)

    def first(curve_K: np.ndarray, target: float) -> int:
        curve = np.interp(np.log(every), np.log(lengths), curve_K)
        below = np.flatnonzero(curve <= target)
        return int(every[below[0]] if below.size else every[-1])

    errors = [
        abs(first(predicted, target) - first(curve, target)) / first(curve, target)
        for target in np.quantile(curves_NK, (0.2, 0.4, 0.6, 0.8))
        for predicted, curve in zip(predicted_NK, curves_NK, strict=True)
        if curve.min() <= target
    ]
    return float(np.mean(errors))
