"""`elastictok compare`: runs side by side, from their config.json and metrics.jsonl alone."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from elastictok_jax.config import flatten, read_config
from elastictok_jax.errors import UsageError
from elastictok_jax.evaluation.html import DPI, Picture, Section, Table, text, write_page
from elastictok_jax.evaluation.output import make_folder, write_csv, write_json
from elastictok_jax.training.metrics import read_metrics

CURVES = ("loss", "mse", "eval/mse", "eval/mse_at_0.25")


def compare_runs(runs: Sequence[Path], *, output: Path | None) -> list[dict[str, Any]]:
    """A row for each run: the config keys in which they differ, and the last value of each metric.

    Args:
      runs: training workdirs, or folders of such, as a sweep leaves them.
      output: where compare.json, compare.csv and report.html with curves go, if anywhere.

    Raises:
      UsageError: if there is no run, or one has no metrics yet.
    """
    workdirs = _workdirs(runs)
    configs = [flatten(read_config(workdir / "config.json")) for workdir in workdirs]
    lines = [read_metrics(workdir / "metrics.jsonl") for workdir in workdirs]
    for workdir, some in zip(workdirs, lines, strict=True):
        if not some:
            raise UsageError(f"{workdir} has no metrics yet: train it first, or leave it out")
    names = _names(workdirs)
    differing = [
        key
        for key in sorted(set().union(*configs))
        if len({repr(config.get(key)) for config in configs}) > 1
    ]
    rows = []
    for name, config, some in zip(names, configs, lines, strict=True):
        last: dict[str, float] = {}
        for line in some:
            last |= line
        row = {"run": name, "step": last.pop("step")}
        row |= {key: config.get(key) for key in differing}
        rows.append(row | dict(sorted(last.items())))
    if output is not None:
        _write(output, rows, dict(zip(names, lines, strict=True)), runs)
    return rows


def in_columns(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as text for a terminal, a line for each key, a column for each run."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[key, *(text(row.get(key)) for row in rows)] for key in keys]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def _workdirs(runs: Sequence[Path]) -> list[Path]:
    found: list[Path] = []
    for run in runs:
        below = sorted(path.parent for path in run.glob("*/config.json"))
        if not (run / "config.json").is_file() and not below:
            raise UsageError(f"{run} is no training workdir, nor a folder of such: check its path")
        found += [run] if (run / "config.json").is_file() else below
    return list(dict.fromkeys(found))


def _names(workdirs: Sequence[Path]) -> list[str]:
    """Paths below the folder that all have in common."""
    paths = [path.resolve() for path in workdirs]
    if len(paths) == 1:
        return [paths[0].name]
    common = os.path.commonpath(paths)
    return [os.path.relpath(path, common) for path in paths]


def _write(
    output: Path,
    rows: list[dict[str, Any]],
    lines: dict[str, list[dict[str, float]]],
    runs: Sequence[Path],
) -> None:
    make_folder(output)
    write_json(output / "compare.json", rows)
    write_csv(output / "compare.csv", rows)
    keys = [key for key in CURVES if any(key in line for some in lines.values() for line in some)]
    figure, axes = plt.subplots(
        1, len(keys), figsize=(4.6 * len(keys), 3.6), squeeze=False, layout="constrained"
    )
    for one, key in zip(axes[0], keys, strict=True):
        for name, some in lines.items():
            points = [(line["step"], line[key]) for line in some if key in line]
            if points:
                one.plot(*zip(*points, strict=True), label=name, linewidth=1.4)
        one.set(title=key, xlabel="step", yscale="log")
        one.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=7)
    figure.savefig(output / "compare.png", dpi=DPI)
    command = shlex.join(["elastictok", "compare", *map(str, runs), "-o", "DIR"])
    parts = (
        Picture(figure, "metrics by step"),
        Table(rows, "settings that differ, and last metrics"),
    )
    write_page(
        output / "report.html",
        title=f"{len(rows)} runs",
        summary="From their metrics.jsonl.",
        command=command,
        sections=[Section("Runs", "", parts)],
    )
    plt.close(figure)
