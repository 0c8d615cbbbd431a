"""`elastictok evaluate`: measures models on clips and writes plots, a report and metrics.json."""

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from elastictok_jax.errors import UsageError
from elastictok_jax.evaluation.clip_metrics import make_clip_metrics
from elastictok_jax.evaluation.eval_clips import (
    Coded,
    EvalClip,
    EvaluationOverrides,
    clips_to_show,
    evaluation_clips,
)
from elastictok_jax.evaluation.measure import (
    MeasurementPlan,
    Record,
    measured_model_properties,
    measured_tokens,
    measurement_plan,
)
from elastictok_jax.evaluation.measurement_store import measure_with_store
from elastictok_jax.evaluation.report.figures import figure_label
from elastictok_jax.evaluation.report.page import write_report
from elastictok_jax.evaluation.report.side_by_side import (
    draw_side_by_side,
    write_side_by_side,
)
from elastictok_jax.evaluation.summary import Measured, summarise_evaluation
from elastictok_jax.progress import Progress
from elastictok_jax.storage.atomic import write_json
from elastictok_jax.storage.outputs import make_output_folder, remove_outputs
from elastictok_jax.tokenizer.api import ElasticTokenizer
from elastictok_jax.tokenizer.goal import Goal
from elastictok_jax.training.metric_writers import read_metrics

RECORDS = "records"  # the folder of measured clips
REPORT = ("metrics.json", "report.html", "report.png", "report.mp4", "tables", "plots")
NO_LIMITS = EvaluationOverrides()


def evaluate_models(
    models: Sequence[str | Path],
    *,
    output: Path,
    data: str | None = None,
    fps: float | None = None,
    limits: EvaluationOverrides = NO_LIMITS,
) -> dict[str, Any]:
    """Measures `models` on the same clips and compares each elastic one with each fixed one.

    Writes metrics.json, tables as CSV, plots, report.html, report.png and report.mp4 below
    `output`. After an interruption, a second run continues with the remaining clips and writes the
    same metrics.json except for times. The first model's config sets what is measured
    (`evaluation.*`).

    Args:
      models: training workdirs or exported folders; pictures show the first one's results.
      data, fps: as in `evaluation_clips`, with the first model's config.
      limits: overrides of the config.

    Raises:
      UsageError: if a model or data is missing, the models cannot be compared, or `output` cannot
        be written.
    """
    tokenizers = [ElasticTokenizer.from_pretrained(model) for model in models]
    _require_alike(tokenizers, models)
    config = limits.of(tokenizers[0].config)
    make_output_folder(output / RECORDS)
    clips = evaluation_clips(config, data=data, fps=fps)
    plan, frame_metrics = (
        measurement_plan(tokenizers[0], config.evaluation),
        make_clip_metrics(config),
    )
    with Progress("measuring", unit="clip") as progress:
        records = measure_with_store(
            *(tokenizers, clips, plan, frame_metrics),
            folder=output / RECORDS,
            devices=jax.local_devices(),
            progress=progress.show,
        )
    measured = [
        Measured(name, measured_model_properties(tokenizer), of_model)
        for name, tokenizer, of_model in zip(
            _short_model_names(models), tokenizers, records, strict=True
        )
    ]
    results = summarise_evaluation(measured, clips, plan)
    results["plan"] |= {key: config.evaluation[key] for key in ("max_clips", "max_blocks")}
    results["plan"]["fps"] = sorted({clip.fps for clip in clips if clip.fps})
    curve = read_metrics(Path(models[0]) / "metrics.jsonl")
    held_out = [line["eval/mse"] for line in curve if "eval/mse" in line]
    if held_out:
        results["held_out_mse"] = {"first": held_out[0], "last": held_out[-1]}
    shown = clips_to_show(clips)
    coded, results["clips"] = [], {}
    for clip in clips:
        of_clip = _decode_record(tokenizers[0], clip, measured[0].records[clip.name], plan)
        results["clips"][clip.name] = [
            {"fps": clip.fps, **each.summary(clip.frames)} for each in of_clip
        ]
        if any(clip is each for each in shown):
            coded.append((clip, of_clip))
    remove_outputs(output, REPORT)
    write_json(output / "metrics.json", results)
    sizes = dict(
        frames_per_block=config.video.frames_per_block,
        tokens_per_block=tokenizers[0].tokens_per_block,
    )
    most = sizes["tokens_per_block"]
    title = f"{figure_label(config.name)}: held-out clips, at most {most} tokens a block"
    draw_side_by_side(output / "report.png", coded, title=title, curve=curve, **sizes)
    video = output / "report.mp4"
    write_side_by_side(video, coded, **sizes)
    write_report(
        output,
        title=f"Evaluation of {', '.join(model.name for model in measured)}",
        command=_evaluate_command(models, data, fps, limits),
        measured=measured,
        results=results,
        clips=clips,
        shown=shown,
        plan=plan,
        video=video if video.is_file() else None,
    )
    print(f"report in {output}", file=sys.stderr)
    return results


def _decode_record(
    tokenizer: ElasticTokenizer, clip: EvalClip, record: Record, plan: MeasurementPlan
) -> list[Coded]:
    """Decodes a record's tokens at each target."""
    coded = []
    for target in plan.targets:
        tokens = measured_tokens(tokenizer, clip, record, target)
        coded.append(Coded(Goal(max_mse=target), tokens, tokenizer.decode(tokens)))
    return coded


def _evaluate_command(
    models: Sequence[str | Path], data: str | None, fps: float | None, limits: EvaluationOverrides
) -> str:
    """Returns the command that reproduces an evaluation."""
    words = ["elastictok", "evaluate", str(models[0])]
    for model in models[1:]:
        words += ["--baseline", str(model)]
    words += ["--data", data] if data else []
    words += ["--fps", f"{fps:g}"] if fps is not None else []
    for key, value in dataclasses.asdict(limits).items():
        if value is not None:
            said = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            words += [f"--{key.replace('_', '-')}", said]
    return shlex.join([*words, "-o", "DIR"])


def _short_model_names(models: Sequence[str | Path]) -> list[str]:
    """Returns the folders' names, with as much of their paths as makes them distinct."""
    paths = [Path(model).resolve() for model in models]
    parts = 1
    while parts < max(len(path.parts) for path in paths):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
        parts += 1
    return [str(path) for path in paths]


def _require_alike(tokenizers: Sequence[ElasticTokenizer], models: Sequence[str | Path]) -> None:
    """Raises UsageError if the models cannot be compared on the same blocks."""
    for tokenizer, model in zip(tokenizers, models, strict=True):
        for key in ("resolution", "frames_per_block"):
            theirs, ours = tokenizer.config.video[key], tokenizers[0].config.video[key]
            if theirs != ours:
                raise UsageError(
                    f"{model} has video.{key} = {theirs}, {models[0]} {ours}: compare models of "
                    "equal blocks"
                )
    prints = [tokenizer.fingerprint for tokenizer in tokenizers]
    if len(set(prints)) < len(prints):
        raise UsageError("a model is given twice: give each once")
