"""Opens a video file and decodes its frames in order, from the start or from a keyframe."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import av
from av.stream import Disposition

from elastictok_jax.data.media.color import ToRgb, complete_chroma_siting
from elastictok_jax.data.media.files import LIMITS, MediaError, MediaLimits, require_media_file
from elastictok_jax.data.media.geometry import display_matrix, is_transposed, require_sane_size
from elastictok_jax.paths import file_url

_NO_FILM = Disposition.attached_pic | Disposition.timed_thumbnails


@dataclass
class Decoding:
    """A file being decoded.

    Attributes:
      position: the next frame, once a read has succeeded.
      anchored: a keyframe has passed, so all reference frames of what follows are decoded.
    """

    container: av.container.InputContainer
    frames: Iterator[av.VideoFrame]
    position: int
    anchored: bool
    to_rgb: ToRgb


def open_for_decoding(path: str, *, threads: int, limits: MediaLimits | None = None):
    """Opens a file; returns its container, which the caller closes, and its video stream.

    `limits` are checked when a file is first opened, and None afterwards.
    """
    require_media_file(path)
    try:
        container = av.open(file_url(path))
    except av.FFmpegError as error:
        raise MediaError(f"{path}: {_why_unreadable(path)}") from error
    films = [s for s in container.streams.video if not s.disposition & _NO_FILM]
    best = container.streams.best("video")
    if not films:
        container.close()
        what = "only the cover picture of a sound file" if best else "no video"
        raise MediaError(f"{path}: holds {what}; delete it")
    stream = best if best in films else max(films, key=lambda s: s.height * s.width)
    stream.codec_context.thread_count = threads
    stream.codec_context.thread_type = "NONE" if threads == 1 else "AUTO"
    try:
        if limits is not None:
            require_sane_size(path, stream.height, stream.width, limits=limits)
    except MediaError:
        container.close()
        raise
    return container, stream


def _why_unreadable(path: str) -> str:
    with open(path, "rb") as file:
        is_mp4 = file.read(8)[4:] == b"ftyp"
    if is_mp4:
        return "truncated or damaged: its frame table (moov) is missing; copy it again or delete it"
    return "not a video, whatever its suffix; delete it"


def start_decoding(path, *, threads: int, seek_to: int | None = None) -> Decoding:
    """Opens a file to decode it from its start, or from the keyframe at or before `seek_to`."""
    container, stream = open_for_decoding(path, threads=threads)
    if seek_to is not None:
        container.seek(seek_to, stream=stream, backward=True)
    to_rgb = ToRgb(complete_chroma_siting(stream))
    # Frames may be larger than the first; twice the limit, as decoders round sizes up.
    most = 2 * max(LIMITS.pixels, stream.height * stream.width)
    options = {"max_pixels": str(most), "err_detect": "explode"}  # no error concealment
    stream.codec_context.options = stream.codec_context.options | options
    frames = _without_damaged_head(container, stream)
    return Decoding(container, frames, position=0, anchored=seek_to is None, to_rgb=to_rgb)


def _without_damaged_head(container, stream) -> Iterator[av.VideoFrame]:
    """Yields all frames from the first sound one on; raises FFmpegError at damage after it."""
    # A recording cut from a longer one may start with frames whose references were cut off.
    started = False
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except EOFError:
            return
        except av.FFmpegError:
            if started:
                raise
            continue
        for frame in frames:
            started = started or not frame.is_corrupt
            if started:
                yield frame


def decoding_frame_size(path: str, *, threads: int) -> tuple[int, int]:
    """Returns height and width of the first frame as shown; MediaError if it does not decode."""
    decoding = start_decoding(path, threads=threads)
    with decoding.container:
        try:
            frame = next(decoding.frames, None)
        except av.FFmpegError:
            frame = None
        if frame is None:
            raise MediaError(f"{path}: damaged: no frame can be decoded; delete it")
        turned = is_transposed(display_matrix(frame))
        return (frame.width, frame.height) if turned else (frame.height, frame.width)


def decoding_frame_times(path: str, *, threads: int) -> tuple[Any, ...]:
    """Decodes a file and returns each frame's timestamp, or None, in order.

    Slow: for files whose packets do not tell.
    """
    decoding = start_decoding(path, threads=threads)
    times: list[int | None] = []
    with decoding.container:
        try:
            for frame in decoding.frames:
                if frame.is_corrupt:
                    raise MediaError(
                        f"{path}: damaged after {len(times)} frames; re-encode or delete it"
                    )
                times.append(frame.pts)
        except av.FFmpegError as error:
            raise MediaError(
                f"{path}: damaged after {len(times)} frames ({error.strerror}); re-encode or "
                "delete it"
            ) from error
    return tuple(times)
