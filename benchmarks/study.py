"""The paper's experiments at the size of a laptop: one command, resumed where it was stopped.

    benchmarks/fetch_data.sh data/study
    python -m benchmarks.study [--seeds 0,1,2] [--runs runs/study] [-o docs]

For each seed trains a tokenizer that drops nothing and, from its weights, elastic, unconditioned
and fixed ones (experiments/study_*.py); evaluates these five on held-out scenes; and writes
study.md, its plots and report.html.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import describe_machine
from benchmarks.table import table
from elastictok_jax.evaluation.eval_clips import CLIP_KINDS

MODELS = {
    "elastic": "study_elastic",
    "unconditioned": "study_unconditioned",
    "fixed25": "study_fixed:share=0.25",
    "fixed50": "study_fixed:share=0.5",
    "fixed100": "study_fixed:share=1.0",
}
BASE_STEPS = 500  # of the tokenizer that the others start from
LOOSE, STRICT = 0.045, 0.03  # targets, MSE
PAPER_RATIOS = {
    ("images", LOOSE): 3.5,
    ("images", STRICT): 1.3,
    ("videos", LOOSE): 5.0,
    ("videos", STRICT): 2.4,
}
PAPER_R = {"single_block": 0.77, "multi_block": 0.67}


def run(*words: str) -> None:
    """One `elastictok` command, its messages shown."""
    subprocess.run([sys.executable, "-m", "elastictok_jax", *words], check=True)


def workdir(runs: Path, name: str, seed: int) -> Path:
    return runs / f"{name}-{seed}"


def train_and_evaluate(runs: Path, seed: int, *, data: str, overrides: Sequence[str]) -> Path:
    """Trains the five models of a seed and evaluates them together; returns the results' folder."""

    def train(name: str, experiment: str, *settings: str) -> None:
        words = ["train", experiment, "--workdir", str(workdir(runs, name, seed))]
        run(*words, f"--config.seed={seed}", *settings, *overrides)

    train("base", MODELS["fixed100"], f"--config.train.steps={BASE_STEPS}")
    for name, experiment in MODELS.items():
        train(name, experiment, f"--config.train.init_from={workdir(runs, 'base', seed)}")
    first, *others = (str(workdir(runs, name, seed)) for name in MODELS)
    output = runs / f"evaluation-{seed}"
    baselines = [word for other in others for word in ("--baseline", other)]
    run("evaluate", first, *baselines, "--data", data, "-o", str(output))
    return output


def over_seeds(values: Sequence[float | None]) -> str:
    """Mean and spread (lowest to highest) of a figure that each seed gives, or does not have."""
    found = [value for value in values if value is not None]
    if not found:
        return "-"
    lacking = f", {len(found)} of {len(values)} seeds" if len(found) < len(values) else ""
    if len(found) == 1:
        return f"{found[0]:.3g}{lacking}"
    return f"{np.mean(found):.3g} ({min(found):.3g} to {max(found):.3g}{lacking})"


def kinds_of(results: Sequence[dict[str, Any]]) -> list[str]:
    """The kinds of clips that there are."""
    return [kind for kind in CLIP_KINDS if kind in results[0]["models"][0]]


def ratio_rows(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """How many times fewer tokens elastic takes than each fixed tokenizer at equal share met."""
    rows = []
    targets = sorted({row["target"] for row in results[0]["comparisons"]})
    for kind in kinds_of(results):
        for target in reversed(targets):
            row: dict[str, Any] = {"clips": kind, "MSE": target}
            for fixed in ("fixed100", "fixed50", "fixed25"):
                found = [_compared(result, kind, target, fixed) for result in results]
                row[f"ratio to {fixed}"] = over_seeds([each.get("ratio") for each in found])
                alike = [each.get("ratio_missed_alike") for each in found]
                row[f"missed alike, {fixed}"] = over_seeds(alike)
                row[f"share met by {fixed}"] = over_seeds([each.get("met_share") for each in found])
            row["paper's ratio"] = PAPER_RATIOS.get((kind, target), "-")
            rows.append(row)
    return rows


def _compared(result: dict[str, Any], kind: str, target: float, fixed: str) -> dict[str, Any]:
    for row in result["comparisons"]:
        named = row["elastic"].startswith("elastic-") and row["fixed"].startswith(f"{fixed}-")
        if named and (row["clips"], row["target"]) == (kind, target):
            return row
    return {}


def threshold_rows(results: Sequence[dict[str, Any]], keys: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each model, kind of clip and target: `keys` of `tokens_at_targets` over seeds."""
    return [
        {"model": name, "clips": kind, "MSE": rows[0]["target"]}
        | {key.replace("_", " "): over_seeds([row[key] for row in rows]) for key in keys}
        for name in MODELS
        for kind in kinds_of(results)
        for rows in _thresholds(results, name, kind)
    ]


def conditioning_rows(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conditioned encoder beside the one that is not (Table 5)."""
    keys = ("met_share", "tokens_mean", "encoder_passes_per_block", "seconds_per_block")
    names = {"elastic": "conditioned", "unconditioned": "not"}
    rows = []
    for kind in kinds_of(results):
        pairs = [_thresholds(results, name, kind) for name in names]
        for of_target in zip(*pairs, strict=True):
            row: dict[str, Any] = {"clips": kind, "MSE": of_target[0][0]["target"]}
            for key in keys:
                for name, by_seed in zip(names.values(), of_target, strict=True):
                    label = f"{key.replace('_', ' ')}, {name}"
                    row[label] = over_seeds([each[key] for each in by_seed])
            rows.append(row)
    return rows


def _thresholds(
    results: Sequence[dict[str, Any]], name: str, kind: str
) -> list[tuple[dict[str, Any], ...]]:
    """For each target, what each seed's model `name` has of it."""
    index = list(MODELS).index(name)
    by_seed = [result["models"][index][kind]["thresholds"] for result in results]
    return list(zip(*by_seed, strict=True))


def energy_rows(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Correlation of tokens used with high-frequency energy, beside the paper's."""
    keys = ("pearson_r", "pearson_r_of_log_energy", "spearman_r")
    rows = []
    for index, name in enumerate(MODELS):
        for kind in kinds_of(results):
            by_seed = [result["models"][index][kind]["energy"] for result in results]
            for way in by_seed[0] or ():
                row: dict[str, Any] = {"model": name, "clips": kind, "blocks": way}
                row |= {k.replace("_", " "): over_seeds([r[way][k] for r in by_seed]) for k in keys}
                rows.append(row | {"paper's r": PAPER_R[way]})
    return rows


def write_study(
    results: Sequence[dict[str, Any]], *, output: Path, command: str, page: Path
) -> None:
    """study.md, headed by what study_notes.md says if it is there, and beside it study/ with the
    first seed's plots and report.html."""
    notes = output / "study_notes.md"
    folder = output / "study"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in [page / "report.html", *sorted((page / "plots").glob("*.png"))]:
        (folder / path.name).write_bytes(path.read_bytes())
    first = results[0]["models"][0]
    size = "; ".join(
        f"{kind} {first[kind]['clips']} clips, {first[kind]['blocks']} blocks"
        for kind in kinds_of(results)
    )
    keys = ("met_share", "met_share_at_half", "tokens_mean", "tokens_p95", "tokens_max")
    parts = [
        "<!-- benchmarks.study makes this: its tables, below the text of study_notes.md. -->",
        "# A study at the size of a laptop",
        *([notes.read_text().strip()] if notes.is_file() else []),
        f"Made by `{command}` on {describe_machine()}. {len(results)} seeds: mean (lowest to "
        f"highest). Held out: {size}.",
        "## Tokens at an equal share of blocks (Fig. 4)",
        "How many times fewer tokens the elastic tokenizer needs to bring to a target the share of "
        "blocks that a fixed one brings there; a dash where it cannot bring so many there with any "
        "number of tokens, or the fixed one brings none. Blocks that are given up are known before "
        "and take 8 tokens; missed alike: each takes what the fixed one spends on it. The loose "
        f"target is {LOOSE:g}, the strict one {STRICT:g}.",
        table(ratio_rows(results)),
        "![](study/targets_met_by_tokens_used.png)",
        "## Thresholds (Tables 3 and 4)",
        "Met share at half: if the elastic tokenizer may spend 64 tokens a block in the mean, and "
        "by hindsight spends the least on blocks that it cannot bring to the target.",
        table(threshold_rows(results, keys)),
        "## Conditioned and unconditioned encoder (Table 5)",
        "The paper: 79.6% of blocks under MSE 0.003 against 75.3%, and encoding twice as fast "
        "without. Seconds are noisy on such a machine.",
        table(conditioning_rows(results)),
        "## Tokens and high-frequency energy (Fig. 9)",
        table(energy_rows(results)),
        "![](study/tokens_and_high_frequency_energy.png)",
        "The rest, with pictures and video, is in [study/report.html](study/report.html).",
    ]
    (output / "study.md").write_text("\n\n".join(parts) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--runs", type=Path, default=Path("runs/study"))
    parser.add_argument("--data", default="data/study/heldout", help="clips to evaluate on")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs"))
    args, overrides = parser.parse_known_args()
    seeds = [int(seed) for seed in args.seeds.split(",")]
    folders = [
        train_and_evaluate(args.runs, seed, data=args.data, overrides=overrides) for seed in seeds
    ]
    results = [json.loads((folder / "metrics.json").read_text()) for folder in folders]
    command = shlex.join(["python", "-m", "benchmarks.study", *sys.argv[1:]])
    write_study(results, output=args.output, command=command, page=folders[0])


if __name__ == "__main__":
    main()
