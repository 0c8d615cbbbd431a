"""The report of benchmarks/gpu.sh, in Markdown, from what its steps have left in a folder.

python -m benchmarks.gpu_report FOLDER
"""

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jaxlib

from benchmarks.machine import describe_machine
from benchmarks.table import table

LARGEST_PARTS = 3


def environment() -> dict[str, str]:
    """What the figures were measured on."""
    try:
        words = [
            "nvidia-smi",
            "--query-gpu=name,driver_version,memory.total",
            "--format=csv,noheader",
        ]
        device = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        device = f"none (jax: {jax.devices()[0].device_kind})"
    return {
        "device, driver, memory": device,
        "machine": describe_machine(),
        "python": platform.python_version(),
        "jax, jaxlib": f"{jax.__version__}, {jaxlib.__version__}",
    }


def training_row(path: Path) -> dict[str, Any]:
    """The figures of one run of benchmarks.train_step that are compared."""
    results = json.loads(path.read_text())
    parts = results["parts"][:LARGEST_PARTS]
    return {
        "run": path.stem.removeprefix("train-"),
        "batch": results["batch"],
        "step_ms": results["step_seconds"] * 1e3,
        "tokens_per_second": results["tokens_per_second"],
        "utilisation_6PT": results["utilisation_6_parameters_tokens"],
        "with_attention": results["utilisation_with_attention"],
        "peak_gib": results["peak_gib"],
        "compile_s": results["compile_seconds"],
        "largest parts": ", ".join(f"{part['part']} {part['share']:.0%}" for part in parts),
    }


def report(folder: Path) -> str:
    """All that the steps have left; a step that has left nothing shows in the first table alone."""
    steps = [line.split("\t") for line in (folder / "steps.tsv").read_text().splitlines()]
    chapters = [
        table([{"": key, "value": value} for key, value in environment().items()]),
        table([dict(step=name, result=state, seconds=took) for name, state, took in steps]),
    ]
    checks = [json.loads(path.read_text()) for path in sorted(folder.glob("check-*.json"))]
    if checks:
        rows = [row for check in checks for row in check]
        chapters.append(f"### Backends against the dense reference\n\n{table(rows)}")
    for name, title in (
        ("attention", "Attention by backend"),
        ("tiles", "Attention by size of tiles"),
    ):
        path = folder / f"{name}.json"
        if not path.exists():
            continue
        results = json.loads(path.read_text())
        rows = results.pop("rows")
        setup = ", ".join(f"{key}: {value}" for key, value in results.items())
        chapters.append(f"### {title}\n\n{setup}\n\n{table(rows)}")
    training = [training_row(path) for path in sorted(folder.glob("train-*.json"))]
    if training:
        chapters.append(f"### Training step of the 200m model\n\n{table(training)}")
    for name, state, _ in steps:
        log = folder / f"{name}.log"
        if state != "passed" and log.exists():
            end = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
            chapters.append(f"### {name}: {state}\n\n```\n{end}\n```")
    return "\n\n".join(chapters)


if __name__ == "__main__":
    print(report(Path(sys.argv[1])))
