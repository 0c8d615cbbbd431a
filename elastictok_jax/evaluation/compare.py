"""`elastictok compare`: compares runs using only their config.json and metrics.jsonl."""

import hashlib
import math
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from elastictok_jax.config import flatten_config, read_config
from elastictok_jax.errors import UsageError
from elastictok_jax.evaluation.report import figures
from elastictok_jax.evaluation.report.figures import plt
from elastictok_jax.evaluation.report.html import (
    DPI,
    Picture,
    Section,
    Table,
    html_text,
    write_html,
)
from elastictok_jax.storage.atomic import write_json
from elastictok_jax.storage.csv_files import csv_columns, write_csv
from elastictok_jax.storage.outputs import make_output_folder
from elastictok_jax.training.metric_writers import read_metrics
from elastictok_jax.training.workdir import read_workdir_held_out

# Config keys that determine the blocks a run is evaluated on. The seed only affects their order.
JUDGED_BY = (
    *("data.sources.", "data.eval_fraction", "data.packing", "data.batch_size"),
    *("data.sequence_blocks", "evaluation.batches", "video."),
)
CURVES = ("loss", "mse", "eval/mse", "eval/mse_at_0.25")


def compare_runs(runs: Sequence[Path], *, output: Path | None) -> list[dict[str, Any]]:
    """Returns a row per run with the config keys that differ and the last value of each metric.

    If the runs were evaluated on different held-out data, `held_out` is an 8-digit hex digest of
    each run's data: metrics that begin with `eval/` are comparable only between equal digests.

    Args:
      runs: training workdirs, or folders of workdirs as written by a sweep.
      output: folder for compare.json, compare.csv and report.html with curves, or None.

    Raises:
      UsageError: if there is no run, or a run has no metrics yet.
    """
    workdirs = _workdirs(runs)
    configs = [flatten_config(read_config(workdir / "config.json")) for workdir in workdirs]
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
    judged = _held_out(workdirs, configs)
    rows = []
    for name, config, some, data in zip(names, configs, lines, judged, strict=True):
        last: dict[str, float | None] = {}
        for line in some:
            last |= {key: value if math.isfinite(value) else None for key, value in line.items()}
        row: dict[str, Any] = {"run": name, "step": last.pop("step")}
        row |= {"held_out": data} if len(set(judged)) > 1 else {}
        row |= {key: config.get(key) for key in differing}
        rows.append(row | dict(sorted(last.items())))
    if output is not None:
        _write(output, rows, dict(zip(names, lines, strict=True)), runs)
    return rows


def compare_held_out_warning(rows: Sequence[dict[str, Any]]) -> str | None:
    """Returns a warning if the runs were evaluated on different held-out data, else None."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        groups.setdefault(row.get("held_out", ""), []).append(row["run"])
    if len(groups) < 2:
        return None
    said = "; ".join(f"{data}: {', '.join(runs)}" for data, runs in groups.items())
    return (
        "The runs were evaluated on different held-out data, so their eval/ metrics are "
        f"comparable only within one held_out: {said}."
    )


def _held_out(workdirs: Sequence[Path], configs: Sequence[dict[str, Any]]) -> list[str]:
    """Returns an 8-digit hex digest of each run's held-out data.

    If all runs have recorded their files, the digest covers these instead of the paths.
    """
    files = [read_workdir_held_out(workdir) for workdir in workdirs]
    noted = None not in files
    digests = []
    for config, known in zip(configs, files, strict=True):
        keys = sorted(key for key in config if key.startswith(JUDGED_BY))
        said = [(key, config[key]) for key in keys if not (noted and key.endswith(".path"))]
        said.append(("files", known if noted else None))
        digests.append(hashlib.sha256(repr(said).encode()).hexdigest()[:8])
    return digests


def compared_columns(rows: Sequence[dict[str, Any]]) -> str:
    """Formats rows for a terminal, with a line per key and a column per run."""
    keys = csv_columns(rows)
    cells = [[key, *(html_text(row.get(key)) for row in rows)] for key in keys]
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
            raise UsageError(f"{run} is not a training workdir or a folder of them: check its path")
        found += [run] if (run / "config.json").is_file() else below
    return list(dict.fromkeys(found))


def _names(workdirs: Sequence[Path]) -> list[str]:
    """Returns paths relative to the deepest common folder."""
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
    make_output_folder(output)
    write_json(output / "compare.json", rows)
    write_csv(output / "compare.csv", rows)
    keys = [key for key in CURVES if any(key in line for some in lines.values() for line in some)]
    parts: list[Picture | Table] = [Table(rows, "settings that differ and final metrics")]
    picture = output / "compare.png"
    picture.unlink(missing_ok=True)
    if keys:
        figure = _curves(keys, lines)
        figures.save_figure(figure, picture, dpi=DPI)
        parts.insert(0, Picture(figure, "metrics by step"))
    command = shlex.join(["elastictok", "compare", *map(str, runs), "-o", "DIR"])
    write_html(
        output / "report.html",
        title=f"{len(rows)} runs",
        summary=" ".join(
            filter(None, ("From their metrics.jsonl.", compare_held_out_warning(rows)))
        ),
        command=command,
        sections=[Section("Runs", "", parts)],
    )
    plt.close("all")


def _curves(keys: Sequence[str], lines: dict[str, list[dict[str, float]]]) -> Figure:
    figure, axes = plt.subplots(
        1, len(keys), figsize=(4.6 * len(keys), 3.6), squeeze=False, layout="constrained"
    )
    for one, key in zip(axes[0], keys, strict=True):
        for name, some in lines.items():
            points = [(line["step"], line[key]) for line in some if key in line]
            if points:
                one.plot(
                    *zip(*points, strict=True), label=figures.figure_label(name), linewidth=1.4
                )
        one.set(title=key, xlabel="step", yscale="log")
        figures.figure_log_ticks(one.yaxis)
        one.grid(alpha=0.3)
    handles = {
        name: line
        for one in axes[0]
        for line, name in zip(*one.get_legend_handles_labels(), strict=True)
    }
    axes[0, 0].legend(handles.values(), handles.keys(), fontsize=7)
    return figure
