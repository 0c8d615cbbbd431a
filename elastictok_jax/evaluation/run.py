"""`elastictok evaluate` and `elastictok reconstruct`: code clips, write figures and JSON."""

import json
import os
import sys
from pathlib import Path

from elastictok_jax.data import media
from elastictok_jax.errors import UsageError
from elastictok_jax.evaluation.protocol import Clip, code_clip, held_out_clips, summarise
from elastictok_jax.evaluation.report import draw_report, write_side_by_side
from elastictok_jax.tokenizer.api import ElasticTokenizer
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
    targets = config.evaluation.targets
    coded = [(c, code_clip(tokenizer, c, targets=targets, progress=show_blocks)) for c in clips]
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
    max_mse: float,
    search: str = "binary",
    resolution: int | None = None,
    max_frames: int | None = None,
) -> dict[str, object]:
    """Encodes and decodes one file; writes reconstruction.png (frames and token strip),
    reconstruction.mp4 (video only) and reconstruction.json below `output`.

    Raises:
      UsageError: on a bad file, model or option.
    """
    if not max_mse > 0:
        raise UsageError(f"--max-mse {max_mse}: give an error above 0, e.g. 0.007")
    info = media.probe(source)
    count = min(info.frames, max_frames or info.frames)
    frames = media.read_frames(source, count=count, side=resolution)
    tokenizer = ElasticTokenizer.from_pretrained(model)
    make_folder(output)
    clip = Clip(Path(source).stem, frames, info.fps if info.kind == "video" else 0.0)
    coded = code_clip(tokenizer, clip, targets=[max_mse], search=search, progress=show_blocks)
    sizes = dict(
        frames_per_block=tokenizer.config.video.frames_per_block,
        tokens_per_block=tokenizer.tokens_per_block,
    )
    title = f"{clip.name}: MSE at most {max_mse:g} a block"
    draw_report(output / "reconstruction.png", [(clip, coded)], title=title, **sizes)
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
