"""`elastictok reconstruct`: encodes and decodes one file and draws the result."""

import sys
from pathlib import Path

import numpy as np

from elastictok_jax.data.frame_stream import PIPE, open_frame_stream
from elastictok_jax.errors import UsageError
from elastictok_jax.evaluation.eval_clips import EvalClip, code_eval_clip
from elastictok_jax.evaluation.report.figures import figure_label
from elastictok_jax.evaluation.report.side_by_side import (
    draw_side_by_side,
    write_side_by_side,
)
from elastictok_jax.storage.atomic import write_json
from elastictok_jax.storage.outputs import make_output_folder, remove_outputs
from elastictok_jax.tokenizer.api import ElasticTokenizer
from elastictok_jax.tokenizer.goal import Goal

RECONSTRUCTION = ("reconstruction.json", "reconstruction.png", "reconstruction.mp4")


def reconstruct_file(
    source: str,
    *,
    model: str | Path,
    output: Path,
    goal: Goal,
    resolution: int | None = None,
    max_frames: int | None = None,
    fps: float | None = None,
) -> dict[str, object]:
    """Encodes and decodes one file and writes the results below `output`.

    These are reconstruction.png (frames and token strip), reconstruction.mp4 (video only) and
    reconstruction.json.

    Raises:
      UsageError: on a bad file, model or option.
    """
    if source == PIPE:
        raise UsageError("reconstruct reads a file: `elastictok encode -` reads a pipe")
    stream = open_frame_stream(source, side=resolution, max_frames=max_frames, fps=fps)
    tokenizer = ElasticTokenizer.from_pretrained(model)
    make_output_folder(output)
    frames = np.stack(list(stream.frames))
    for note in stream.notes:
        print(f"note: {note}", file=sys.stderr)
    clip = EvalClip(Path(source).stem, frames, stream.fps)
    coded = code_eval_clip(tokenizer, clip, goals=[goal], progress=_show_blocks)
    sizes = dict(
        frames_per_block=tokenizer.config.video.frames_per_block,
        tokens_per_block=tokenizer.tokens_per_block,
    )
    remove_outputs(output, RECONSTRUCTION)
    draw_side_by_side(
        output / "reconstruction.png",
        [(clip, coded)],
        title=f"{figure_label(clip.name)}: {goal}",
        **sizes,
    )
    write_side_by_side(output / "reconstruction.mp4", [(clip, coded)], **sizes)
    results = {"input": str(source), "fps": clip.fps, **coded[0].summary(frames)}
    write_json(output / "reconstruction.json", results)
    print(f"reconstruction in {output}", file=sys.stderr)
    return results


def _show_blocks(what: str, done: int, total: int) -> None:
    """Prints a counter on a terminal, or in a log one line once all blocks are coded."""
    terminal = sys.stderr.isatty()
    if terminal or done == total:
        start, end = ("\r", "\n" if done == total else "") if terminal else ("", "\n")
        print(f"{start}coding {what}: {done}/{total} blocks", end=end, file=sys.stderr, flush=True)
