"""Plots the figures of an evaluation (`summary.py`) in the manner of the paper."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from elastictok_jax.evaluation.eval_clips import CLIP_KINDS, EvalClip
from elastictok_jax.evaluation.fraction_met import fraction_met_curve
from elastictok_jax.evaluation.measure import MeasurementPlan, Record
from elastictok_jax.evaluation.report import figures
from elastictok_jax.evaluation.report.figures import figure_log_ticks, plt
from elastictok_jax.evaluation.summary import Measured, join_records

# Safe for colour-blind readers.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
FILM_FRAMES = 8  # frames of a video shown above its tokens
Models = Sequence[dict[str, Any]]


def _figure(columns: int, *, height: float = 3.4) -> tuple[Figure, list[Any]]:
    figure, axes = plt.subplots(
        1, columns, figsize=(4.6 * columns, height), squeeze=False, layout="constrained"
    )
    for one in axes[0]:
        one.grid(alpha=0.3)
    return figure, list(axes[0])


def _plotted_kinds(models: Models) -> list[str]:
    """Returns the clip kinds that were measured."""
    return [kind for kind in CLIP_KINDS if kind in models[0]]


def plot_fraction_met(
    measured: Sequence[Measured], kind_of: Mapping[str, str], plan: MeasurementPlan
) -> Figure | None:
    """Plots the fraction of blocks that meet each target against token use (Fig. 4)."""
    kinds = [kind for kind in CLIP_KINDS if kind in kind_of.values()]
    figure, axes = _figure(len(kinds), height=3.8)
    for one, kind in zip(axes, kinds, strict=True):
        for model, line in zip(measured, ("-", "--", "-.", ":") * len(measured), strict=False):
            records = [r for name, r in model.records.items() if kind_of[name] == kind]
            for colour, target in zip(COLOURS * 9, plan.targets, strict=False):
                lengths, met = (
                    join_records(records, f"target/{target:g}/{k}") for k in ("lengths", "met")
                )
                most = model.facts["tokens_per_block"]
                if model.facts["fixed_tokens"] is not None:
                    point = (model.facts["fixed_tokens"] / most, met.mean())
                    one.plot(*point, "o", color=colour, markersize=5)
                    continue
                least = model.facts["min_tokens"]
                tokens, shares = fraction_met_curve(lengths, met.astype(bool), least=least)
                label = (
                    f"{figures.figure_label(model.name)}, MSE {target:g}"
                    if one is axes[0]
                    else None
                )
                one.plot(tokens / most, shares, line, color=colour, label=label, linewidth=1.6)
        one.set(xlabel="fraction of tokens used", title=kind, xlim=(0, 1.02), ylim=(-0.02, 1.02))
    axes[0].set_ylabel("fraction of blocks that meet the target")
    if axes[0].get_legend_handles_labels()[0]:
        axes[0].legend(fontsize=7, title="dots: fixed tokenizers", title_fontsize=7)
    return figure


def plot_rate(key: str, label: str) -> Callable[[Models], Figure | None]:
    """Returns a function that plots one metric of `rates` against bits per pixel x 16."""

    def draw(models: Models) -> Figure | None:
        kinds = [
            k
            for k in _plotted_kinds(models)
            if any(r.get(key) is not None for m in models for r in m[k]["rates"])
        ]
        if not kinds:
            return None
        figure, axes = _figure(len(kinds))
        for one, kind in zip(axes, kinds, strict=True):
            for colour, model in zip(COLOURS * 9, models, strict=False):
                rows = [row for row in model[kind]["rates"] if row.get(key) is not None]
                points = [(row["bpp16"], row[key]) for row in rows]
                one.plot(
                    *zip(*points, strict=True),
                    "o-",
                    color=colour,
                    label=figures.figure_label(model["name"]),
                )
                coded = [(r["bpp16_coded"], r[key]) for r in rows if r.get("bpp16_coded")]
                if coded:
                    one.plot(*zip(*coded, strict=True), ".:", color=colour, alpha=0.7)
            one.set(xscale="log", xlabel="bits per pixel x 16 (dotted: entropy-coded)", title=kind)
            figure_log_ticks(one.xaxis)
        axes[0].set_ylabel(label)
        axes[0].legend(fontsize=7)
        return figure

    return draw


def plot_loss_by_tokens(models: Models) -> Figure | None:
    """Plots error against tokens (Fig. 5)."""
    kinds = _plotted_kinds(models)
    figure, axes = _figure(len(kinds))
    for one, kind in zip(axes, kinds, strict=True):
        for colour, model in zip(COLOURS * 9, models, strict=False):
            points = [(row["tokens"], row["mse"]) for row in model[kind]["rates"]]
            one.plot(
                *zip(*points, strict=True),
                "o-",
                color=colour,
                label=figures.figure_label(model["name"]),
            )
        one.set(xscale="log", yscale="log", xlabel="tokens a block", title=kind)
        figure_log_ticks(one.xaxis, one.yaxis)
    axes[0].set_ylabel("MSE")
    axes[0].legend(fontsize=7)
    return figure


def plot_context(models: Models) -> Figure | None:
    """Plots quality against frames of context (Fig. 6)."""
    some = [m for m in models if m.get("videos", {}).get("context")]
    if not some:
        return None
    figure, axes = _figure(1)
    for colour, model in zip(COLOURS * 9, some, strict=False):
        points = [(row["frames"], row["psnr_of_mse"]) for row in model["videos"]["context"]]
        axes[0].plot(
            *zip(*points, strict=True),
            "o-",
            color=colour,
            label=figures.figure_label(model["name"]),
        )
    axes[0].set(xlabel="frames of context", ylabel="PSNR, dB, at half of the tokens")
    axes[0].legend(fontsize=7)
    return figure


def plot_energy(
    measured: Measured, kind_of: Mapping[str, str], plan: MeasurementPlan
) -> Figure | None:
    """Plots tokens used against high-frequency energy, per block alone and in context (Fig. 9)."""
    if measured.facts["fixed_tokens"] is not None:
        return None
    figure, axes = _figure(2)
    keys = ("single/lengths", f"target/{plan.main_target:g}/lengths")
    energies = join_records(list(measured.records.values()), "energy")
    least = min(energies[energies > 0], default=1.0) / 10
    for one, key, title in zip(axes, keys, ("each block alone", "in context"), strict=True):
        for colour, kind in zip(COLOURS, CLIP_KINDS, strict=False):
            records = [r for name, r in measured.records.items() if kind_of[name] == kind]
            if records:
                x, y = join_records(records, "energy"), join_records(records, key)
                x = np.maximum(x, least)  # flat blocks have zero energy, and the axis is log
                one.plot(x, y, ".", color=colour, label=kind, alpha=0.6)
        one.set(
            xscale="log",
            xlabel="high-frequency energy of the block",
            title=f"{title}, MSE {plan.main_target:g}",
        )
        figure_log_ticks(one.xaxis)
    axes[0].set_ylabel("tokens used")
    axes[0].legend(fontsize=7)
    return figure


def plot_crops(clip: EvalClip, pictures: Sequence[tuple[str, np.ndarray]]) -> Figure:
    """Shows one frame at several lengths (Fig. 5): the original, then the named `pictures`."""
    every = [("original", clip.frames[0]), *pictures]
    figure, axes = plt.subplots(
        1, len(every), figsize=(1.5 * len(every), 1.9), squeeze=False, layout="constrained"
    )
    for one, (label, image) in zip(axes[0], every, strict=True):
        one.imshow(image, interpolation="bicubic")
        one.set_title(label, fontsize=7)
        one.axis("off")
    return figure


def plot_tokens_over_time(
    clips: Sequence[EvalClip],
    records: Mapping[str, Record],
    plan: MeasurementPlan,
    *,
    frames_per_block: int,
    tokens_per_block: int,
) -> Figure | None:
    """Plots the tokens of each block below the frames of each video, with scene cuts (Fig. 1)."""
    videos = [clip for clip in clips if len(clip.frames) > 1]
    if not videos:
        return None
    figure, axes = plt.subplots(
        2 * len(videos),
        1,
        figsize=(9, 2.1 * len(videos)),
        height_ratios=[1, 1] * len(videos),
        squeeze=False,
        layout="constrained",
    )
    for index, clip in enumerate(videos):
        film, strip = axes[2 * index, 0], axes[2 * index + 1, 0]
        frames = clip.frames[np.linspace(0, len(clip.frames) - 1, FILM_FRAMES).round().astype(int)]
        film.imshow(np.concatenate(list(frames), axis=1), interpolation="bicubic", aspect="auto")
        film.axis("off")
        film.set_title(figures.figure_label(clip.name), fontsize=8)
        record = records[clip.name]
        for colour, target in zip(COLOURS * 9, plan.targets, strict=False):
            lengths = record[f"target/{target:g}/lengths"]
            edges = np.minimum(np.arange(len(lengths) + 1) * frames_per_block, len(clip.frames))
            strip.stairs(lengths, edges, color=colour, linewidth=1.5, label=f"MSE {target:g}")
            missed = ~record[f"target/{target:g}/met"].astype(bool)
            strip.plot((edges[:-1] + edges[1:])[missed] / 2, lengths[missed], "x", color=colour)
        for cut in record["cuts"]:
            strip.axvline(cut, color="black", linestyle=":", linewidth=1)
        strip.set(xlim=(0, len(clip.frames)), ylim=(0, tokens_per_block * 1.08))
        strip.tick_params(labelsize=6)
        strip.set_ylabel("tokens", fontsize=7)
    axes[1, 0].legend(fontsize=6, ncols=4)
    axes[-1, 0].set_xlabel(
        "frame (x: target missed, least error kept; dotted: scene cut)", fontsize=7
    )
    return figure
