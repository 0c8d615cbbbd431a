"""Opens an image, a video or a pipe as a stream of frames to encode.

Dimension key: H height, W width.
"""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import BinaryIO

import numpy as np

from elastictok_jax.data import media
from elastictok_jax.data.frame_rate import is_writable_frame_rate
from elastictok_jax.data.media import raw_video
from elastictok_jax.errors import UsageError

PIPE = "-"


@dataclass
class FrameStream:
    """Frames that can be read once.

    Attributes:
      name: its name in messages.
      frames: uint8 [H, W, 3] each.
      height, width: in pixels, of `frames`.
      fps: frames per second, 0 for an image.
      num_frames: upper bound on the number of `frames`, None if unknown.
      notes: lines on what is lost of the original.
      fault: why `frames` ended early; "" unless a pipe was cut off.
    """

    name: str
    frames: Iterable[np.ndarray]
    height: int
    width: int
    fps: float
    num_frames: int | None
    notes: list[str] = field(default_factory=list)
    fault: str = ""


def open_frame_stream(
    source: str,
    *,
    side: int | None = None,
    max_frames: int | None = None,
    size: tuple[int, int] | None = None,
    fps: float | None = None,
) -> FrameStream:
    """Opens an image, a video, or "-": standard input with raw rgb24 or y4m.

    Args:
      source: a path, or "-".
      side: length of the shortest side to resize to, in pixels.
      max_frames: read no more than these.
      size: width and height of raw frames; None if standard input is y4m.
      fps: of a pipe, its frame rate, which overrides a y4m header; of a video, the rate to read:
        the frames nearest to 0, 1 / fps, 2 / fps, ... seconds, or all if it has fewer.

    Raises:
      UsageError: if it cannot be read, or the options do not fit it.
    """
    for name, value in (("resolution", side), ("max-frames", max_frames)):
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value}: give at least 1")
    if fps is not None and not is_writable_frame_rate(fps):
        raise UsageError(f"--fps {fps:g}: give the frames a second, e.g. 4")
    if source == PIPE:
        stream = _open_pipe(size=size, fps=fps)
    elif size is not None:
        raise UsageError(f"--size is for raw frames from a pipe: {source} has its own")
    elif media.file_kind(source) == "image":
        if fps is not None:
            raise UsageError(f"--fps {fps:g}: {source} is an image; leave it out")
        image = media.read_image(source)
        height, width, _ = image.shape
        stream = FrameStream(source, [image], height, width, fps=0.0, num_frames=1)
    else:
        stream = _open_video(source, fps=fps)
    if source != PIPE and (loss := media.probe_media_loss(source)):
        stream.notes.append(f"{source} {loss}")
    if max_frames is not None:
        stream.frames = islice(stream.frames, max_frames)
        stream.num_frames = min(max_frames, stream.num_frames or max_frames)
    if side is not None:
        stream.frames = _resized(stream.frames, side=side)
        stream.height, stream.width = media.scaled_size(
            stream.height, stream.width, side=side, name=stream.name
        )
    return stream


def _open_video(source: str, *, fps: float | None) -> FrameStream:
    reader = media.VideoReader(source)
    indices = reader.indices_at(fps or reader.fps)
    lowered = fps is not None and fps < reader.fps
    notes = []
    if reader.has_audio:
        notes.append(f"{source}: its sound is left out")
    if fps is not None and fps > reader.fps:
        notes.append(f"{source}: it has {reader.fps:.6g} frames a second, fewer than --fps {fps:g}")
    if not (reader.evenly_spaced or lowered):
        notes.append(
            f"{source}: its frame rate varies; every frame is kept, at the mean of "
            f"{reader.fps:.6g} a second"
        )
    return FrameStream(
        name=source,
        frames=_in_order(reader, indices),
        height=reader.height,
        width=reader.width,
        fps=fps if fps is not None and lowered else reader.fps,
        num_frames=len(indices),
        notes=notes,
    )


def _in_order(reader: media.VideoReader, indices: np.ndarray) -> Iterator[np.ndarray]:
    """Yields frames at ascending `indices`; decodes a repeated one once."""
    with reader:
        for index, times in zip(*np.unique(indices, return_counts=True), strict=True):
            yield from [reader.read(int(index), 1)[0]] * int(times)


def _open_pipe(*, size: tuple[int, int] | None, fps: float | None) -> FrameStream:
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError("standard input is not a pipe: send raw rgb24 frames or y4m into it")
    pipe: BinaryIO = sys.stdin.buffer
    if size is None:
        header = raw_video.read_y4m_header(pipe)
        height, width, rate = header.height, header.width, fps or header.fps
        frames = raw_video.read_y4m(pipe, header)
    else:
        (width, height), rate = size, fps or 0.0
        raw_video.require_raw_size(height, width)
        frames = raw_video.read_raw(pipe, height=height, width=width)
    if not rate:
        raise UsageError("standard input does not give its frame rate: add --fps, e.g. --fps 30")
    if not is_writable_frame_rate(rate):
        raise UsageError(f"standard input gives {rate:g} frames a second: say how many by --fps")
    stream = FrameStream("standard input", [], height, width, rate, None)
    stream.frames = _until_cut_off(frames, stream)
    return stream


def _until_cut_off(frames: Iterator[np.ndarray], stream: FrameStream) -> Iterator[np.ndarray]:
    try:
        yield from frames
    except raw_video.CutOff as cut:
        stream.fault = f"{stream.name} ended {cut}"


def _resized(frames: Iterable[np.ndarray], *, side: int) -> Iterator[np.ndarray]:
    for frame in frames:
        yield media.resize_shortest(frame[None], side=side)[0]
