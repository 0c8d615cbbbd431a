"""Computes the figures of an evaluation from the records of all clips (`measure.py`), in numpy.

Clip kinds are "images" and "videos". Dimension key: N blocks, over all clips of a kind.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from elastictok_jax import __version__
from elastictok_jax.evaluation.correlation import pearson_correlation, spearman_correlation
from elastictok_jax.evaluation.eval_clips import CLIP_KINDS, EvalClip, eval_clip_kinds
from elastictok_jax.evaluation.fraction_met import fraction_met_for_tokens, tokens_for_fraction_met
from elastictok_jax.evaluation.frechet import FVD_METRIC, Moments, frechet_distance
from elastictok_jax.evaluation.measure import MeasurementPlan, Record
from elastictok_jax.layers.codebook import codebook_statistics
from elastictok_jax.pixels import pixel_psnr
from elastictok_jax.tokenizer.search import SEARCHES

SCHEMA = 1  # of metrics.json: incremented when a key changes its meaning
PSNR_SHOWN = 100.0  # dB; caps the infinite PSNR of an exact reconstruction
FRAME_METRICS = ("psnr", "ssim", "ms_ssim", "lpips_alex", "lpips_vgg")


@dataclass(frozen=True)
class Measured:
    """A model and its records of every clip.

    Attributes:
      name: its name in tables; facts: the output of `measured_model_properties`.
      records: by clip name.
    """

    name: str
    facts: dict[str, Any]
    records: Mapping[str, Record]


def join_records(records: Sequence[Record], key: str) -> np.ndarray:
    """Concatenates the arrays under `key`; returns an empty array if no record has it."""
    found = [np.atleast_1d(record[key]) for record in records if key in record]
    return np.concatenate(found) if found else np.zeros(0)


def _model_figures(
    model: Measured, kind_of: Mapping[str, str], plan: MeasurementPlan
) -> dict[str, Any]:
    """Computes all figures of one model by clip kind."""
    figures: dict[str, Any] = {"name": model.name, **model.facts}
    for kind in CLIP_KINDS:
        records = [record for name, record in model.records.items() if kind_of[name] == kind]
        if not records:
            continue
        figures[kind] = {
            "clips": len(records),
            "blocks": len(join_records(records, "energy")),
            "thresholds": [_threshold(model, records, target) for target in plan.targets],
            "rates": [_rate(model, records, share) for share in model.facts["shares"]],
            "context": _context(model, records, plan),
            "energy": _energy(model, records, plan),
            "searches": _searches(records),
        }
    return figures


def _threshold(model: Measured, records: Sequence[Record], target: float) -> dict[str, Any]:
    values = {
        name: join_records(records, f"target/{target:g}/{name}")
        for name in ("lengths", "met", "mse", "evaluations", "encoder_passes")
    }
    lengths, met = values["lengths"], values["met"].astype(bool)
    half, least = model.facts["tokens_per_block"] / 2, model.facts["min_tokens"]
    met_at_half = None
    if model.facts["fixed_tokens"] is None and least <= half:
        met_at_half = fraction_met_for_tokens(lengths, met, least=least, tokens=half)
    prefix = f"target/{target:g}"
    seconds = np.asarray([r[f"{prefix}/seconds"] / len(r[f"{prefix}/mse"]) for r in records])
    seconds = seconds[~np.isnan(seconds)]
    return {
        "target": target,
        "met_share": float(met.mean()),
        "tokens_mean": float(lengths.mean()),
        "tokens_p95": float(np.percentile(lengths, 95)),
        "tokens_max": int(lengths.max()),
        "tokens_mean_of_met": float(lengths[met].mean()) if met.any() else None,
        "met_share_at_half": met_at_half,
        "mse": float(values["mse"].mean()),
        "evaluations_per_block": float(values["evaluations"].mean()),
        "encoder_passes_per_block": float(values["encoder_passes"].mean()),
        "seconds_per_block": float(np.median(seconds)) if seconds.size else None,
    }


def _rate(model: Measured, records: Sequence[Record], share: float) -> dict[str, Any]:
    prefix = f"share/{share:g}"
    pixels = join_records(records, "pixels").sum()
    bits, coded = (join_records(records, f"{prefix}/{name}") for name in ("bits", "coded_bits"))
    mse = float(join_records(records, f"{prefix}/mse").mean())
    row: dict[str, Any] = {
        "share": share,
        "tokens": float(join_records(records, f"{prefix}/lengths").mean()),
        "bpp16": 16 * float(bits.sum()) / pixels,
        "bpp16_coded": 16 * float(coded.sum()) / pixels if len(coded) == len(records) else None,
        "mse": mse,
        "psnr_of_mse": min(pixel_psnr(mse), PSNR_SHOWN),
    }
    for name in FRAME_METRICS:
        values = join_records(records, f"{prefix}/{name}")
        row[name] = _mean(np.minimum(values, PSNR_SHOWN))
    row[FVD_METRIC] = _frechet(records, prefix)
    codes = join_records(records, f"{prefix}/codes")
    if codes.size:
        size = model.facts["codebook_size"]
        use = codebook_statistics(codes, size=size)
        row |= {key: value for key, value in use.items() if key != "tokens"}
    return row


def _frechet(records: Sequence[Record], prefix: str) -> float | None:
    pairs = [r for r in records if "original/features" in r and f"{prefix}/features" in r]
    sides = [join_records(pairs, key) for key in ("original/features", f"{prefix}/features")]
    if len(sides[0]) < 2:
        return None
    return frechet_distance(*map(Moments.of, sides))


def _context(
    model: Measured, records: Sequence[Record], plan: MeasurementPlan
) -> list[dict[str, Any]]:
    """Computes the error by context, over the blocks that have the widest context (Fig. 6)."""
    most = max(plan.contexts)
    rows = []
    for window in plan.contexts:
        key = f"context/{window}/mse"
        full = [record[key][most - 1 :] for record in records if key in record]
        values = np.concatenate(full) if full else np.zeros(0)
        if values.size:
            frames = window * model.facts["frames_per_block"]
            error = float(values.mean())
            row = {"blocks": window, "frames": frames, "blocks_measured": len(values)}
            rows.append(row | {"mse": error, "psnr_of_mse": min(pixel_psnr(error), PSNR_SHOWN)})
    return rows


def _energy(
    model: Measured, records: Sequence[Record], plan: MeasurementPlan
) -> dict[str, Any] | None:
    """Correlates token use with high-frequency energy, per block alone and in context (Fig. 9)."""
    if model.facts["fixed_tokens"] is not None:
        return None
    energy = join_records(records, "energy")
    single = join_records(records, "single/lengths")
    multi = join_records(records, f"target/{plan.main_target:g}/lengths")
    log = np.log(energy + 1e-9)
    return {
        name: {
            "target": plan.main_target,
            "pearson_r": pearson_correlation(energy, lengths),
            "pearson_r_of_log_energy": pearson_correlation(log, lengths),
            "spearman_r": spearman_correlation(energy, lengths),
        }
        for name, lengths in (("single_block", single), ("multi_block", multi))
        if name == "single_block" or len(lengths) > len(records)  # images have only one block
    }


def _searches(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Compares the evaluations and errors of each search with the full search (Table 2)."""
    exact = join_records(records, "search/full/lengths")
    rows = []
    for name in SEARCHES:
        lengths = join_records(records, f"search/{name}/lengths")
        if not exact.size or not lengths.size:
            continue
        met = join_records(records, f"search/{name}/met").astype(bool)
        possible = join_records(records, "search/full/met").astype(bool)
        rows.append(
            {
                "search": name,
                "blocks": len(lengths),
                "evaluations_per_block": float(
                    join_records(records, f"search/{name}/evaluations").mean()
                ),
                "missed_share": float((possible & ~met).mean()),
                "count_error": _mean(np.abs(lengths - exact)[possible] / exact[possible]),
            }
        )
    return rows


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if values.size else None


def summarise_token_use(
    elastic: Measured, fixed: Sequence[Measured], kind_of: Mapping[str, str], plan: MeasurementPlan
) -> list[dict[str, Any]]:
    """Compares token use at the fraction of blocks that a fixed tokenizer brings to each target.

    `ratio` is the fixed tokenizer's tokens over those of the elastic one. Blocks that are given up
    take the fewest tokens in `ratio`, and what the fixed tokenizer spends in `ratio_missed_alike`.
    """
    rows = []
    for kind in CLIP_KINDS:
        names = [name for name in elastic.records if kind_of[name] == kind]
        for target in plan.targets if names else ():
            ours = [elastic.records[name] for name in names]
            lengths, met = (
                join_records(ours, f"target/{target:g}/{name}") for name in ("lengths", "met")
            )
            for other in fixed:
                theirs = [other.records[name] for name in names]
                share = float(join_records(theirs, f"target/{target:g}/met").mean())
                tokens = other.facts["fixed_tokens"]
                needed = alike = None  # the fixed tokenizer may meet the target on no block
                if share > 0:
                    needed, alike = (
                        tokens_for_fraction_met(
                            lengths, met.astype(bool), least=least, fraction=share
                        )
                        for least in (elastic.facts["min_tokens"], tokens)
                    )
                rows.append(
                    {
                        "clips": kind,
                        "target": target,
                        "elastic": elastic.name,
                        "fixed": other.name,
                        "fixed_tokens": tokens,
                        "met_share": share,
                        "elastic_tokens": needed,
                        "ratio": None if needed is None else tokens / needed,
                        "ratio_missed_alike": None if alike is None else tokens / alike,
                    }
                )
    return rows


def summarise_evaluation(
    measured: Sequence[Measured], clips: Sequence[EvalClip], plan: MeasurementPlan
) -> dict[str, Any]:
    """Returns the content of metrics.json except for the individual clips, as JSON values."""
    kind_of = eval_clip_kinds(clips)
    elastic = [model for model in measured if model.facts["fixed_tokens"] is None]
    fixed = [model for model in measured if model.facts["fixed_tokens"] is not None]
    return {
        "schema": SCHEMA,
        "elastictok_jax": __version__,
        "plan": {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(plan).items()
        },
        "models": [_model_figures(model, kind_of, plan) for model in measured],
        "comparisons": [
            row for model in elastic for row in summarise_token_use(model, fixed, kind_of, plan)
        ],
    }
