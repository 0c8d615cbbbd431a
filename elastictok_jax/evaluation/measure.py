"""Measures one model on one clip: all figures that tables and plots are made from.

A record is a flat dictionary of arrays, so that it can be stored and the clip need not be measured
again. Dimension key: N blocks, T frames, F frames a block.

    pixels []                           of the clip
    energy [N]                          high-frequency energy of the pixels
    cuts [C]                            first frames of a scene
    target/X/{lengths,met,mse} [N]      coded to MSE X with all available context
    target/X/{evaluations,encoder_passes} [N]
    target/X/codes                      of all blocks, concatenated
    target/X/seconds []                 nan if it includes compilation
    search/NAME/...                     the same of the first blocks, by a search of `SEARCHES` *
    single/lengths [N]                  to the main target, each block as a separate clip *
    share/S/{mse,lengths} [N]           every block coded with the fraction S of all tokens
    share/S/NAME [T]                    metrics of the decoded frames
    share/S/frame [H, W, 3]             the first decoded frame
    share/S/{bits,coded_bits} []        nominal and entropy-coded
    share/S/features [K, 400]           for a Frechet distance to original/features
    share/S/codes [tokens]              FSQ codes
    context/W/mse [N]                   coded with half of all tokens, W blocks seeing each other *

* not for a fixed tokenizer.
"""

import copy
import dataclasses
import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import ml_collections
import numpy as np

from elastictok_jax.data.prepare.scenes import scene_cuts
from elastictok_jax.evaluation.clip_metrics import ClipMetrics
from elastictok_jax.evaluation.eval_clips import EvalClip
from elastictok_jax.tokenizer import entropy
from elastictok_jax.tokenizer.api import ElasticTokenizer
from elastictok_jax.tokenizer.block_codec import CodedBlock
from elastictok_jax.tokenizer.goal import Goal
from elastictok_jax.tokenizer.length_policies import FixedLength, LengthPolicy
from elastictok_jax.tokenizer.search import SEARCHES
from elastictok_jax.tokenizer.tiling import TileGrid
from elastictok_jax.tokenizer.tokens import Tokens

Record = dict[str, np.ndarray]
CONTEXT_SHARE = 0.5  # fraction of all tokens at which context is varied
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)  # fractions of a block's tokens
BPP16 = (0.31, 0.56, 0.81, 1.0)  # bits per pixel x 16 at which newer papers report


@dataclass(frozen=True)
class MeasurementPlan:
    """The settings of a measurement.

    Attributes:
      targets: MSE on the [-1, 1] scale, ascending.
      contexts: numbers of blocks that see each other.
      main_target: the target for single blocks and for the comparison of searches.
      search_blocks: number of blocks of a clip that every search codes.
    """

    targets: tuple[float, ...]
    contexts: tuple[int, ...]
    main_target: float
    search_blocks: int


def measure_clip(
    tokenizer: ElasticTokenizer, clip: EvalClip, plan: MeasurementPlan, frame_metrics: ClipMetrics
) -> Record:
    """Returns all figures of a clip of the model's resolution, cut into blocks of one tile."""
    grid = TileGrid(clip.frames.shape[:3], tokenizer.geometry)
    record: Record = {
        "pixels": np.asarray(math.prod(clip.frames.shape[:3])),
        "energy": measure_block_energy(clip.frames, frames_per_block=grid.frames_per_block),
        "cuts": scene_cuts(clip.frames),
    }
    fixed = tokenizer.geometry.fixed_tokens
    if fixed is not None:  # the same tokens for every target
        coded, seconds = _timed_code(tokenizer, clip, FixedLength(itertools.repeat(fixed)))
        for target in plan.targets:
            record |= _named(f"target/{target:g}", _as_coded(coded, seconds, target=target))
    else:
        for target in plan.targets:
            record |= _named(f"target/{target:g}", _to_target(tokenizer, clip, target))
        lengths = record[f"target/{plan.main_target:g}/lengths"]
        if grid.blocks > 1:
            alone = _with_window(tokenizer, 1)
            lengths = _to_target(alone, clip, plan.main_target)["lengths"]
        record["single/lengths"] = lengths
    if fixed is None and plan.search_blocks:
        first = dataclasses.replace(
            clip, frames=clip.frames[: plan.search_blocks * grid.frames_per_block]
        )
        for name, method in SEARCHES.items():
            if tokenizer.router is not None or not method.needs_router:
                found = _to_target(tokenizer, first, plan.main_target, search=name)
                record |= _named(f"search/{name}", found)
    if frame_metrics.features is not None and len(clip.frames) > 1:
        record["original/features"] = frame_metrics.features(clip.frames)
    for share in _measured_fractions(tokenizer):
        record |= _named(f"share/{share:g}", _at_share(tokenizer, clip, grid, share, frame_metrics))
    if grid.blocks > 1 and fixed is None:
        half = max(tokenizer.min_tokens, round(CONTEXT_SHARE * tokenizer.tokens_per_block))
        for window in plan.contexts:
            seen = _with_window(tokenizer, window)
            coded = seen.code(
                clip.frames, grid, [FixedLength(itertools.repeat(half))], metric="mse"
            )
            record[f"context/{window}/mse"] = np.asarray([block.mse for block in coded])
    return record


def measurement_plan(
    tokenizer: ElasticTokenizer, evaluation: ml_collections.ConfigDict
) -> MeasurementPlan:
    """Returns the plan of the config's section, for clips of up to `max_blocks` blocks.

    Contexts double up to the one trained with, or to half of `max_blocks`, so that clips have
    blocks with that context.
    """
    targets = tuple(sorted(evaluation.targets))
    window = max(1, min(tokenizer.window_blocks, evaluation.max_blocks // 2))
    return MeasurementPlan(
        targets=targets,
        contexts=(*(1 << power for power in range((window - 1).bit_length())), window),
        main_target=targets[len(targets) // 2],
        search_blocks=evaluation.search_blocks,
    )


def _pixels_per_block(config: ml_collections.ConfigDict) -> int:
    return config.video.frames_per_block * config.video.resolution**2


def measured_model_properties(tokenizer: ElasticTokenizer) -> dict[str, Any]:
    """Returns the properties of a model that figures and tables use, as JSON values."""
    config, code = tokenizer.config, tokenizer.codec.code
    return {
        "experiment": config.name,
        "fingerprint": tokenizer.fingerprint,
        "seed": config.seed,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(tokenizer.params)),
        "conditioned": tokenizer.codec.knows_length,
        "bottleneck": config.model.get("bottleneck"),
        "codebook_size": code.size or None,
        "bits_per_token": code.bits,
        "tokens_per_block": tokenizer.tokens_per_block,
        "min_tokens": tokenizer.min_tokens,
        "fixed_tokens": tokenizer.geometry.fixed_tokens,
        "frames_per_block": config.video.frames_per_block,
        "resolution": config.video.resolution,
        "pixels_per_block": _pixels_per_block(config),
        "window_blocks": tokenizer.window_blocks,
        "shares": list(_measured_fractions(tokenizer)),
    }


def _measured_fractions(tokenizer: ElasticTokenizer) -> tuple[float, ...]:
    """Returns the fractions of all tokens that a model is measured at, ascending.

    These are SHARES and, for video, those of BPP16, down to the fewest tokens in training; for a
    fixed tokenizer, only its own.
    """
    fixed, every = tokenizer.geometry.fixed_tokens, tokenizer.tokens_per_block
    if fixed is not None:
        return (fixed / every,)
    bits = tokenizer.codec.code.bits * every
    most = 16 * bits / _pixels_per_block(tokenizer.config)
    wanted = (*SHARES, *(bpp16 / most for bpp16 in BPP16))
    lengths = {round(share * every) for share in wanted}
    return tuple(n / every for n in sorted(lengths) if tokenizer.min_tokens <= n <= every)


def measure_block_energy(frames_THWC: np.ndarray, *, frames_per_block: int) -> np.ndarray:
    """Returns float64 [N], the mean high-frequency energy of the frames of each block.

    It is the energy of the luminance, on the [-1, 1] scale, at or above 0.25 cycles per pixel, half
    the Nyquist frequency, as a mean square of pixels (Parseval).
    """
    luma = frames_THWC.astype(np.float64) @ np.asarray([0.299, 0.587, 0.114]) / 127.5 - 1.0
    height, width = luma.shape[1:]
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None, :]
    high = np.hypot(rows, columns) >= 0.25
    power = np.abs(np.fft.fft2(luma)) ** 2 / (height * width) ** 2
    energy_T = (power * high).sum(axis=(1, 2))
    starts = range(0, len(energy_T), frames_per_block)
    return np.asarray([energy_T[start : start + frames_per_block].mean() for start in starts])


def _with_window(tokenizer: ElasticTokenizer, blocks: int) -> ElasticTokenizer:
    """Returns the same tokenizer with another number of blocks that see each other."""
    other = copy.copy(tokenizer)
    other.window_blocks = blocks
    return other


def _named(prefix: str, values: Record) -> Record:
    return {f"{prefix}/{name}": value for name, value in values.items()}


def _to_target(
    tokenizer: ElasticTokenizer, clip: EvalClip, target: float, *, search: str = "hybrid"
) -> Record:
    policy = tokenizer.threshold(Goal(max_mse=target, search=search))
    return _as_coded(*_timed_code(tokenizer, clip, policy), target=target)


def _timed_code(
    tokenizer: ElasticTokenizer, clip: EvalClip, policy: LengthPolicy
) -> tuple[list[CodedBlock], float]:
    """Returns the coded blocks of a clip, and the seconds that it took."""
    grid = TileGrid(clip.frames.shape[:3], tokenizer.geometry)
    start = time.perf_counter()
    coded = tokenizer.code(clip.frames, grid, [policy], metric="mse")
    return coded, time.perf_counter() - start


def _as_coded(coded: Sequence[CodedBlock], seconds: float, *, target: float) -> Record:
    mse = np.asarray([block.mse for block in coded])
    return {
        "lengths": np.asarray([len(block.codes) for block in coded], np.int32),
        "met": mse <= target,
        "mse": mse,
        "evaluations": np.asarray([block.evaluations for block in coded], np.int32),
        "encoder_passes": np.asarray([block.encoder_passes for block in coded], np.int32),
        "codes": np.concatenate([block.codes for block in coded]),
        "seconds": np.asarray(seconds),
    }


def _at_share(
    tokenizer: ElasticTokenizer,
    clip: EvalClip,
    grid: TileGrid,
    share: float,
    frame_metrics: ClipMetrics,
) -> Record:
    length = max(1, round(share * tokenizer.tokens_per_block))
    coded = tokenizer.code(clip.frames, grid, [FixedLength(itertools.repeat(length))], metric="mse")
    tokens = tokenizer.tokens(coded, grid, fps=clip.fps)
    decoded = tokenizer.decode(tokens)
    record = {
        "mse": np.asarray(tokens.mse, np.float64),
        "lengths": tokens.lengths,
        "bits": np.asarray(tokens.bits),
        "frame": decoded[0],
        **frame_metrics.frames(clip.frames, decoded),
    }
    if tokens.levels:
        record["codes"] = np.concatenate(tokens.codes)
    if tokens.levels and entropy.is_entropy_coder_installed():
        record["coded_bits"] = np.asarray(tokens.entropy_coded_bits())
    if frame_metrics.features is not None and len(clip.frames) > 1:
        record["features"] = frame_metrics.features(decoded)
    return record


def measured_tokens(
    tokenizer: ElasticTokenizer, clip: EvalClip, record: Record, target: float
) -> Tokens:
    """Returns the entries of a record for the tokens of a clip."""
    of = {name: record[f"target/{target:g}/{name}"] for name in ("codes", "lengths", "mse", "met")}
    return Tokens(
        codes=np.split(of["codes"], np.cumsum(of["lengths"])[:-1]),
        mse=of["mse"].astype(np.float32),
        met=of["met"],
        frames=len(clip.frames),
        height=clip.frames.shape[1],
        width=clip.frames.shape[2],
        fps=clip.fps,
        bits_per_token=tokenizer.codec.code.bits,
        fingerprint=tokenizer.fingerprint,
        window_blocks=tokenizer.window_blocks,
        levels=tokenizer.codec.code.levels,
    )
