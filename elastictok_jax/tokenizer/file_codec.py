"""Encodes images and videos into .etok files and decodes them, for the command line.

Both directions stream, so a video may be of any length; only its tokens are held in memory.
"""

import dataclasses
import itertools
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from elastictok_jax import ctrl_c
from elastictok_jax.data import media
from elastictok_jax.data.frame_rate import frame_rate_fault
from elastictok_jax.data.frame_stream import PIPE, FrameStream, open_frame_stream
from elastictok_jax.errors import RunError, UsageError
from elastictok_jax.pixels import pixel_psnr
from elastictok_jax.progress import Progress
from elastictok_jax.storage.outputs import try_output_file
from elastictok_jax.tokenizer import entropy, etok
from elastictok_jax.tokenizer.api import ElasticTokenizer
from elastictok_jax.tokenizer.goal import Goal
from elastictok_jax.tokenizer.tiling import TileGrid
from elastictok_jax.tokenizer.tokens import Tokens

FPS = 24.0  # of videos decoded from tokens without a frame rate
LOSSLESS_SUFFIX = ".mkv"
VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", LOSSLESS_SUFFIX)


def encode_file(
    source: str,
    *,
    model: str | Path,
    output: Path,
    goal: Goal,
    resolution: int | None = None,
    max_frames: int | None = None,
    window_blocks: int | None = None,
    coding: str = "plain",
    size: tuple[int, int] | None = None,
    fps: float | None = None,
) -> dict[str, object]:
    """Encodes an image, a video or standard input ("-") into one .etok file.

    A budget of a file is spent over the complete clip, which is then in memory. A budget of a
    pipe, and any other goal, is met block by block as frames arrive.

    Args:
      resolution: length in pixels to resize the shortest side to; None keeps the size.
      window_blocks: how many blocks see each other; as in training if None.
      coding: as in `Tokens.save`.
      size: width and height of raw frames; fps: as in `open_frame_stream`.

    Returns:
      The results, as JSON values.

    Raises:
      UsageError: on a bad file, model or option.
      RunError: if the input ended early, or is longer than one file may hold; `output` then holds
        the frames before.
    """
    if output.suffix != ".etok":
        raise UsageError(f"-o {output}: the name of a token file must end in .etok")
    _require_writable(output)
    _require_window(window_blocks)
    if source == PIPE and goal.total_tokens is not None:
        raise UsageError("--total-tokens needs the complete clip; for a pipe give --budget")
    stream = open_frame_stream(source, side=resolution, max_frames=max_frames, size=size, fps=fps)
    for note in stream.notes:
        print(f"note: {note}", file=sys.stderr)
    tokenizer = ElasticTokenizer.from_pretrained(model)
    if coding == "entropy":
        entropy.require_entropy_coder(tokenizer.codec.code.levels)
    layout = TileGrid((1, stream.height, stream.width), tokenizer.geometry).describe()
    if layout:
        print(f"note: {layout}", file=sys.stderr)
    if window_blocks is not None:
        tokenizer.window_blocks = window_blocks
    if goal.spends and source != PIPE:
        tokens = _encode_complete(tokenizer, stream, goal)
    else:
        tokens = _encode_in_order(tokenizer, stream, goal)
    tokens.save(output, coding=coding)
    if stream.fault:
        raise RunError(
            f"{stream.fault}: the {tokens.frames} frames before are in {output}; fix what "
            "sends it, or cut it there, and encode the rest into another file"
        )
    return {"input": source, "output": str(output)} | _etok_summary(tokens, tokenizer, output, goal)


def _encode_complete(tokenizer: ElasticTokenizer, stream: FrameStream, goal: Goal) -> Tokens:
    video = np.stack(list(stream.frames))
    grid = TileGrid(video.shape[:3], tokenizer.geometry)
    sizes = dict(low=tokenizer.min_tokens, high=tokenizer.tokens_per_block)
    count = goal.total(grid.blocks * grid.tiles, **sizes)
    if video.size // 3 > etok.MAX_PIXELS or count > etok.MAX_TOKENS:
        raise UsageError(
            f"{stream.name} to {goal} is more than one .etok file may hold: cut it, or lower "
            "--max-frames"
        )
    with Progress(f"encoding {stream.name}", unit="block") as progress:
        tokens = tokenizer.encode(
            video, **dataclasses.asdict(goal), fps=stream.fps, progress=progress.show
        )
    assert isinstance(tokens, Tokens)
    return tokens


def _encode_in_order(tokenizer: ElasticTokenizer, stream: FrameStream, goal: Goal) -> Tokens:
    options = dataclasses.asdict(goal)
    del options["total_tokens"]
    pieces: list[Tokens] = []
    frames = count = size = 0
    with Progress(f"encoding {stream.name}", unit="frame") as progress:
        try:
            for piece in tokenizer.encode_stream(stream.frames, **options, fps=stream.fps):
                frames, count = frames + piece.frames, count + piece.num_tokens
                size += 9 * len(piece.codes) + sum(code.nbytes for code in piece.codes)
                too_many = frames * piece.height * piece.width > etok.MAX_PIXELS
                too_large = size > etok.MAX_FILE_BYTES - etok.MAX_HEADER_BYTES
                if too_many or too_large or count > etok.MAX_TOKENS:
                    stream.fault = f"{stream.name} is more than one .etok file may hold"
                    break
                pieces.append(piece)
                progress.show(frames, stream.num_frames)
        except KeyboardInterrupt:  # the usual way to stop a camera
            if not pieces:
                raise
            ctrl_c.take_over_ctrl_c()
            stream.fault = f"{stream.name} was interrupted"
    if not pieces:
        raise UsageError(stream.fault or f"{stream.name} has no frames: send at least one")
    return Tokens.join(pieces)


def _etok_summary(
    tokens: Tokens, tokenizer: ElasticTokenizer, path: Path, goal: Goal
) -> dict[str, object]:
    """Returns the contents and quality of an .etok file, as JSON values."""
    grid = TileGrid((tokens.frames, tokens.height, tokens.width), tokenizer.geometry)
    error = float(np.average(tokens.mse, weights=grid.pixels))
    return {
        "goal": str(goal),
        "frames": tokens.frames,
        "height": tokens.height,
        "width": tokens.width,
        "fps": tokens.fps,
        "layout": grid.describe(),
        "tiles": [grid.rows, grid.columns],
        "blocks": len(tokens.codes),
        "blocks_met": int(tokens.met.sum()),
        "tokens": tokens.num_tokens,
        "tokens_per_block": tokens.num_tokens / len(tokens.codes),
        "most_tokens_per_block": tokenizer.tokens_per_block,
        "bits": tokens.bits,
        "file_bytes": path.stat().st_size,
        "mse": error,
        "psnr_db": pixel_psnr(error) if error else None,  # JSON has no infinity
    }


def encode_file_summary(results: dict) -> str:
    """Returns the results of `encode_file` as one or two lines of text."""
    lines = [
        f"{results['output']}: {results['frames']} frames, {results['blocks']} blocks, "
        f"{results['tokens']} tokens ({results['tokens_per_block']:.1f} of "
        f"{results['most_tokens_per_block']} a block), {results['bits']:.0f} bits nominal, "
        f"{results['file_bytes']} bytes in the file, MSE {results['mse']:.4g} "
        f"({pixel_psnr(results['mse']):.1f} dB)"
    ]
    missed = results["blocks"] - results["blocks_met"]
    if missed:
        lines.append(
            f"{missed} of {results['blocks']} blocks miss {results['goal']}: no number of tokens "
            "that was tried reaches it"
        )
    return "\n".join(lines)


def decode_file(
    source: str | Path,
    *,
    model: str | Path,
    output: Path,
    window_blocks: int | None = None,
    fps: float | None = None,
) -> dict[str, object]:
    """Decodes an .etok file into a picture, numbered pictures (a name with %05d) or a video.

    A video is encoded in H.264, for viewing, or, as .mkv, in FFV1, which is lossless. It keeps the
    size and frame rate of the original.

    Args:
      window_blocks: most blocks that may see each other; as in training if None.
      fps: frames per second of the video, overrides that of the tokens.

    Raises:
      UsageError: on a bad file, model or output.
    """
    _require_window(window_blocks)
    suffix = output.suffix.lower()
    numbered = "%" in output.name
    if suffix not in VIDEO_SUFFIXES and suffix not in media.WRITABLE_IMAGES:
        known = " ".join([*sorted(media.WRITABLE_IMAGES), *VIDEO_SUFFIXES])
        raise UsageError(f"-o {output}: unknown suffix {suffix!r}; use one of {known}")
    if numbered and not re.fullmatch(r"[^%]*%(0\d)?d[^%]*", output.name):
        raise UsageError(f"-o {output}: name numbered pictures like frame-%05d.png")
    _require_writable(output)
    tokens = Tokens.load(source)
    _require_kind(output, tokens, numbered=numbered)
    rate = tokens.fps
    if suffix in VIDEO_SUFFIXES:
        rate = _writable_rate(output, tokens, fps)
    elif fps is not None:
        raise UsageError(f"--fps {fps:g}: pictures have no frame rate; leave it out, or write .mp4")
    tokenizer = ElasticTokenizer.from_pretrained(model)
    if window_blocks is not None:
        tokenizer.window_blocks = window_blocks
    with Progress(f"decoding {source}", unit="frame") as progress:
        frames = _shown(
            (frame for piece in tokenizer.decode_stream([tokens]) for frame in piece),
            progress,
            total=tokens.frames,
        )
        if suffix in VIDEO_SUFFIXES:
            _write_video(output, frames, tokens, fps=rate)
        else:
            for number, frame in enumerate(frames):
                name = output.name % number if numbered else output.name
                media.write_image(output.with_name(name), frame)
            if numbered:
                _remove_numbered(output, first=tokens.frames)
    return {
        "input": str(source),
        "output": str(output),
        "frames": tokens.frames,
        "height": tokens.height,
        "width": tokens.width,
        "fps": rate,
    }


def _remove_numbered(output: Path, *, first: int) -> None:
    """Removes pictures numbered `first` and above, left by the decoding of a longer clip."""
    for number in itertools.count(first):
        try:
            output.with_name(output.name % number).unlink()
        except FileNotFoundError:
            return


def _require_kind(output: Path, tokens: Tokens, *, numbered: bool) -> None:
    """Raises UsageError if a video is to be written as one picture, or an image as a video."""
    is_video = output.suffix.lower() in VIDEO_SUFFIXES
    if is_video and (tokens.frames, tokens.fps) == (1, 0.0):
        raise UsageError(f"-o {output}: the tokens are of an image; write a .png or .jpg")
    if not is_video and not numbered and tokens.frames > 1:
        numbers = output.with_name(f"{output.stem}-%05d{output.suffix}")
        raise UsageError(
            f"-o {output}: the tokens are of {tokens.frames} frames; write an .mp4, or as many "
            f"pictures with -o {numbers}"
        )
    if is_video and numbered:
        raise UsageError(f"-o {output}: only pictures are numbered; leave out the %")


def _writable_rate(output: Path, tokens: Tokens, fps: float | None) -> float:
    """Returns the frame rate of the video to write, or raises UsageError if it is not valid."""
    rate = tokens.fps if fps is None else fps
    if fps is None and not rate:
        print(f"note: the tokens have no frame rate: {FPS:g} a second is written", file=sys.stderr)
        rate = FPS
    fault = frame_rate_fault(output, rate)
    if fault:
        raise UsageError(f"{fault}; give another rate with --fps")
    return rate


def _write_video(output: Path, frames: Iterable[np.ndarray], tokens: Tokens, *, fps: float) -> None:
    odd = tokens.height % 2 or tokens.width % 2  # 4:2:0 has no odd sizes
    media.write_video(
        output,
        frames,
        fps=fps,
        codec="ffv1" if output.suffix.lower() == LOSSLESS_SUFFIX else "libx264",
        chroma="4:4:4" if odd else "4:2:0",
    )


def _shown(frames: Iterable[np.ndarray], progress: Progress, *, total: int) -> Iterator[np.ndarray]:
    for number, frame in enumerate(frames, start=1):
        yield frame
        progress.show(number, total)


def _require_window(window_blocks: int | None) -> None:
    if window_blocks is not None and not 1 <= window_blocks <= etok.MAX_TOKENS:
        most = etok.MAX_TOKENS
        raise UsageError(f"--window-blocks {window_blocks}: give at least 1 and at most {most}")


def _require_writable(path: Path) -> None:
    """Raises UsageError if no file can be made at `path`, before the work rather than after."""
    if path.is_dir():
        raise UsageError(f"-o {path} is a folder: name a file in it")
    if not path.parent.is_dir():
        raise UsageError(f"-o {path}: its folder does not exist; make it first")
    try:
        try_output_file(path)
    except OSError as error:
        raise UsageError(
            f"-o {path} cannot be written ({error.strerror}): choose another place"
        ) from None
