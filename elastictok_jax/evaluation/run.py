"""`elastictok evaluate` and `elastictok reconstruct`: code clips, write figures and JSON."""

import json
import os
import sys
from pathlib import Path

import numpy as np

from elastictok_jax.data.footage import PIPE, open_footage
from elastictok_jax.errors import UsageError
from elastictok_jax.evaluation.protocol import Clip, code_clip, held_out_clips, summarise
from elastictok_jax.evaluation.report import draw_report, write_side_by_side
from elastictok_jax.tokenizer.api import ElasticTokenizer
from elastictok_jax.tokenizer.goal import Goal
from elastictok_jax.training.metrics import read_metrics


def evaluate_model(model: str | Path, *, output: Path) -> dict[str, object]:
    """Codes the held-out clips at every `evaluation.targets`; writes metrics.json, report.png
    and report.mp4 below `output`, and returns the content of metrics.json.

    Raises:
      UsageError: if there is no model, or `output` cannot be written.
    """
    tokenizer = ElasticTokenizer.from_pretrained(model)
    config = tokenizer.config
    make_folder(output)
    clips = held_out_clips(config)
    goals = [Goal(max_mse=target) for target in config.evaluation.targets]
    coded = [(c, code_clip(tokenizer, c, goals=goals, progress=show_blocks)) for c in clips]
    curve = read_metrics(Path(model) / "metrics.jsonl")
    sizes = dict(
        frames_per_block=config.video.frames_per_block,
        tokens_per_block=tokenizer.tokens_per_block,
    )
    draw_report(
        output / "report.png",
        coded,
        title=f"{config.name}: held-out clips, {tokenizer.tokens_per_block} tokens a block at most",
        curve=curve,
        **sizes,
    )
    write_side_by_side(output / "report.mp4", coded, **sizes)
    results = summarise(coded)
    held_out = [line["eval/mse"] for line in curve if "eval/mse" in line]
    if held_out:
        results["held_out_mse"] = {"first": held_out[0], "last": held_out[-1]}
    write_json(output / "metrics.json", results)
    print(f"report in {output}", file=sys.stderr)
    return results


def reconstruct_file(
    source: str,
    *,
    model: str | Path,
    output: Path,
    goal: Goal,
    resolution: int | None = None,
    max_frames: int | None = None,
) -> dict[str, object]:
    """Encodes and decodes one file; writes reconstruction.png (frames and token strip),
    reconstruction.mp4 (video only) and reconstruction.json below `output`.

    Raises:
      UsageError: on a bad file, model or option.
    """
    if source == PIPE:
        raise UsageError("reconstruct reads a file: `elastictok encode -` reads a pipe")
    footage = open_footage(source, side=resolution, max_frames=max_frames)
    tokenizer = ElasticTokenizer.from_pretrained(model)
    frames = np.stack(list(footage.stream))
    make_folder(output)
    for note in footage.notes:
        print(f"note: {note}", file=sys.stderr)
    clip = Clip(Path(source).stem, frames, footage.fps)
    coded = code_clip(tokenizer, clip, goals=[goal], progress=show_blocks)
    sizes = dict(
        frames_per_block=tokenizer.config.video.frames_per_block,
        tokens_per_block=tokenizer.tokens_per_block,
    )
    draw_report(
        output / "reconstruction.png", [(clip, coded)], title=f"{clip.name}: {goal}", **sizes
    )
    write_side_by_side(output / "reconstruction.mp4", [(clip, coded)], **sizes)
    results = {"input": str(source), **coded[0].summary(frames)}
    write_json(output / "reconstruction.json", results)
    print(f"reconstruction in {output}", file=sys.stderr)
    return results


def show_blocks(what: str, done: int, total: int) -> None:
    """A counter on a terminal; in a log, one line when all blocks are coded."""
    terminal = sys.stderr.isatty()
    if terminal or done == total:
        start, end = ("\r", "\n" if done == total else "") if terminal else ("", "\n")
        print(f"{start}coding {what}: {done}/{total} blocks", end=end, file=sys.stderr, flush=True)


def make_folder(folder: Path) -> None:
    """Raises UsageError if `folder` cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be written ({error.strerror}): choose another -o"
        ) from None


def write_json(path: Path, value: object) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, path)
