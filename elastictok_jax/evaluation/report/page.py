"""Writes the plots, tables and report.html of an evaluation."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from elastictok_jax.evaluation.eval_clips import CLIP_KINDS, EvalClip, eval_clip_kinds
from elastictok_jax.evaluation.frechet import FVD_METRIC
from elastictok_jax.evaluation.measure import SHARES, MeasurementPlan, Record
from elastictok_jax.evaluation.report import plots
from elastictok_jax.evaluation.report.figures import plt, save_figure
from elastictok_jax.evaluation.report.html import DPI, Picture, Section, Table, Video, write_html
from elastictok_jax.evaluation.summary import Measured
from elastictok_jax.storage.csv_files import write_csv
from elastictok_jax.storage.outputs import make_output_folder

PICTURES = 3  # clips whose crops are shown at several lengths

PAPER_RATIOS = "the paper's are 3.5 (loose) and 1.3 (strict) on images, 5 and 2.4 on video"


def write_report(
    output: Path,
    *,
    title: str,
    command: str,
    measured: Sequence[Measured],
    results: dict[str, Any],
    clips: Sequence[EvalClip],
    shown: Sequence[EvalClip],
    plan: MeasurementPlan,
    video: Path | None,
) -> None:
    """Writes report.html, tables/*.csv and plots/*.png and .svg below `output`.

    Args:
      results: from `summarise_evaluation`; clips: all measured clips; shown: the clips to picture;
        video: an MP4 to show, if any.
    """
    tables, figures = output / "tables", output / "plots"
    for folder in (tables, figures):
        make_output_folder(folder)
    sections = []
    kind_of = eval_clip_kinds(clips)
    for section in _sections(
        measured, results, kind_of=kind_of, shown=shown, plan=plan, video=video
    ):
        parts = [part for part in section.parts if not isinstance(part, Table) or part.rows]
        counts = {Table: 0, Picture: 0, Video: 0}  # numbered separately by type
        for part in parts:
            number = counts[type(part)]
            counts[type(part)] += 1
            name = "_".join([*_slug(section.title), *([str(number)] if number else [])])
            if isinstance(part, Table):
                write_csv(tables / f"{name}.csv", part.rows)
            elif isinstance(part, Picture):
                save_figure(
                    part.image, figures / f"{name}.png", dpi=DPI, metadata={"Software": None}
                )
                save_figure(part.image, figures / f"{name}.svg", metadata={"Date": None})
        if parts:
            sections.append(Section(section.title, section.text, parts))
    first, limits = results["models"][0], results["plan"]
    numbers = ", ".join(f"{first[kind]['clips']} {kind}" for kind in CLIP_KINDS if kind in first)
    blocks = sum(first[kind]["blocks"] for kind in CLIP_KINDS if kind in first)
    summary = (
        f"{numbers} (at most {limits['max_clips']} per source and {limits['max_blocks']} blocks "
        f"per clip), {blocks} blocks of {first['frames_per_block']} frames at "
        f"{first['resolution']} pixels{_at_rates(limits['fps'])}; MSE is on the [-1, 1] scale."
    )
    write_html(
        output / "report.html", title=title, summary=summary, command=command, sections=sections
    )
    plt.close("all")


def _at_rates(rates: Sequence[float]) -> str:
    if not rates:
        return ""
    said = " to ".join(f"{rate:.4g}" for rate in dict.fromkeys([min(rates), max(rates)]))
    return f", video at {said} frames a second"


def _slug(title: str) -> list[str]:
    return "".join(c if c.isalnum() else " " for c in title.lower()).split()


def _sections(
    measured: Sequence[Measured],
    results: dict[str, Any],
    *,
    kind_of: Mapping[str, str],
    shown: Sequence[EvalClip],
    plan: MeasurementPlan,
    video: Path | None,
) -> list[Section]:
    models, first = results["models"], measured[0]
    elastic = next((m for m in measured if m.facts["fixed_tokens"] is None), first)
    return [
        Section("Models", "", [Table([_facts(model) for model in models], "the models measured")]),
        Section(
            "Targets met by tokens used",
            "Tokens go first to the blocks that need fewest for the target; a dot is a fixed "
            "tokenizer. The ratio is how many times fewer tokens the elastic tokenizer needs for "
            f"the same fraction of blocks; {PAPER_RATIOS}. Blocks that are given up take the "
            "fewest tokens or, in the last column, what the fixed tokenizer spends on them. "
            "Paper: Fig. 4.",
            [
                *_pictures(
                    [(plots.plot_fraction_met(measured, kind_of, plan), "blocks under a target")]
                ),
                Table(results["comparisons"], "tokens at an equal fraction of blocks met"),
            ],
        ),
        Section(
            "Tokens over time",
            "Tokens used by each block, below the frames. Paper: Fig. 1.",
            [
                *_pictures([(_strips(first, shown, plan), "tokens of each block over time")]),
                *([Video(video.read_bytes(), "original and reconstructions")] if video else []),
            ],
        ),
        Section(
            "Error by tokens",
            "All blocks with the same number of tokens. Paper: Fig. 5.",
            [
                *_pictures([(plots.plot_loss_by_tokens(models), "MSE against tokens a block")]),
                *_pictures(_crops(first, shown)),
            ],
        ),
        Section(
            "Thresholds",
            "Tokens used for each target and the fraction of blocks that met it; also the fraction "
            "that could meet it with a mean of half the tokens. Paper: Tables 3, 4 and 5.",
            [Table(_rows(models, "thresholds"), "by model, clip kind and target")],
        ),
        Section(
            "Rate and distortion",
            "All blocks with the same number of tokens; nominal and entropy-coded bits per pixel "
            f"x 16. {FVD_METRIC} compares logits of 16-frame clips and is biased upwards if there "
            "are few.",
            [
                *_pictures([(plot(models), label) for plot, label in RATE_PLOTS]),
                Table(_rows(models, "rates"), "by model, clip kind and fraction of tokens"),
            ],
        ),
        Section(
            "Context",
            "Quality at half of all tokens against frames of context, over the blocks that have "
            "the longest context. Paper: Fig. 6.",
            [
                *_pictures([(plots.plot_context(models), "PSNR against frames of context")]),
                Table(_rows(models, "context"), "by model and context"),
            ],
        ),
        Section(
            "Tokens and high-frequency energy",
            "The paper's r is 0.77 for blocks alone and 0.67 in context (Fig. 9).",
            [
                *_pictures(
                    [(plots.plot_energy(elastic, kind_of, plan), "tokens used against energy")]
                ),
                Table(_energy_rows(models), "correlation of tokens used with energy"),
            ],
        ),
        Section(
            "Searches",
            "Lengths measured per block, and the error of the count against the full search "
            "(Table 2).",
            [Table(_rows(models, "searches"), "by search")],
        ),
    ]


RATE_PLOTS: tuple[tuple[Callable[[plots.Models], Figure | None], str], ...] = tuple(
    (plots.plot_rate(key, label), f"{label} against rate")
    for key, label in (
        ("psnr_of_mse", "PSNR, dB"),
        ("ssim", "SSIM"),
        ("lpips_alex", "LPIPS (AlexNet)"),
        (FVD_METRIC, "Frechet video distance"),
    )
)


def _pictures(drawn: Sequence[tuple[Figure | None, str]]) -> list[Any]:
    return [Picture(figure, label) for figure, label in drawn if figure is not None]


def _facts(model: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in model.items() if k not in (*CLIP_KINDS, "shares")}


def _rows(models: plots.Models, part: str) -> list[dict[str, Any]]:
    return [
        {"model": model["name"], "clips": kind} | row
        for model in models
        for kind in CLIP_KINDS
        if kind in model
        for row in model[kind][part]
    ]


def _energy_rows(models: plots.Models) -> list[dict[str, Any]]:
    return [
        {"model": model["name"], "clips": kind, "blocks": name} | row
        for model in models
        for kind in CLIP_KINDS
        if model.get(kind, {}).get("energy")
        for name, row in model[kind]["energy"].items()
    ]


def _strips(model: Measured, shown: Sequence[EvalClip], plan: MeasurementPlan) -> Figure | None:
    sizes = {key: model.facts[key] for key in ("frames_per_block", "tokens_per_block")}
    return plots.plot_tokens_over_time(shown, model.records, plan, **sizes)


def _crops(model: Measured, shown: Sequence[EvalClip]) -> list[tuple[Figure, str]]:
    known = model.facts["shares"]
    nearest = np.abs(np.subtract.outer(SHARES, known)).argmin(axis=1)
    shares = [known[index] for index in np.unique(nearest)]
    drawn = []
    for clip in shown[:: max(1, len(shown) // PICTURES)][:PICTURES]:
        record: Mapping[str, Any] | Record = model.records[clip.name]
        tokens = model.facts["tokens_per_block"]
        pictures = [
            (f"{max(1, round(share * tokens))} tokens", record[f"share/{share:g}/frame"])
            for share in shares
        ]
        drawn.append((plots.plot_crops(clip, pictures), f"{clip.name} at several lengths"))
    return drawn
