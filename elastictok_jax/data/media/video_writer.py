"""Encodes frames uint8 [H, W, 3] as a video, in a file or in memory."""

import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Colorspace

from elastictok_jax.data.frame_rate import exact_frame_rate, frame_rate_fault
from elastictok_jax.data.media import color
from elastictok_jax.data.media.files import require_parent_folder
from elastictok_jax.data.media.geometry import require_rgb_frames
from elastictok_jax.errors import RunError, UsageError
from elastictok_jax.paths import file_url
from elastictok_jax.storage.atomic import replacing

_WRITE_FORMATS = {"libx264": "yuv420p", "libx264rgb": "rgb24", "ffv1": "bgr0"}
_CHROMA = {"4:2:0": "yuv420p", "4:4:4": "yuv444p"}
_WRITE_SUFFIXES = frozenset({".mp4", ".mkv", ".mov", ".m4v"})


def write_video(
    path,
    frames: np.ndarray | Iterable[np.ndarray],
    *,
    fps: float,
    crf: int = 18,
    codec: str = "libx264",
    chroma: str = "4:2:0",
    gop: int = 16,
    b_frames: int = 0,
) -> None:
    """Writes uint8 [T, H, W, 3] atomically as a video of `fps` frames a second.

    The suffix is .mp4, .mov, .m4v or .mkv. `frames` may also be an iterable of [H, W, 3], of
    which few are held at a time.
    codec 'libx264' (BT.709; with `chroma` 4:2:0 odd sizes are padded by repeating the edge, with
    4:4:4 they are kept), 'libx264rgb' (lossless with crf 0), or 'ffv1' (lossless, .mkv only).
    `crf` is x264's quality, lower is better; `gop` the most frames from one keyframe to the next.
    Raises UsageError for bad arguments and RunError if the encoder fails.
    """
    if isinstance(frames, np.ndarray):
        frames = require_rgb_frames(frames, dims=4)
    suffix = Path(path).suffix.lower()
    if codec not in _WRITE_FORMATS:
        raise UsageError(f"codec {codec!r} is not one of {' '.join(sorted(_WRITE_FORMATS))}")
    if suffix not in _WRITE_SUFFIXES or (codec == "ffv1" and suffix != ".mkv"):
        raise UsageError(f"{path}: {codec} goes into {'.mkv' if codec == 'ffv1' else '.mp4'}")
    if chroma not in _CHROMA:
        raise UsageError(f"chroma {chroma!r} is not one of {', '.join(_CHROMA)}")
    if fault := frame_rate_fault(path, fps):
        raise UsageError(fault)
    require_parent_folder(path)
    with replacing(Path(path)) as temporary:
        container_options = {} if suffix == ".mkv" else {"movflags": "+faststart"}
        try:
            with av.open(file_url(temporary), "w", options=container_options) as container:
                _encode(
                    container,
                    _of_one_size(frames),
                    fps=fps,
                    crf=crf,
                    codec=codec,
                    chroma=chroma,
                    gop=gop,
                    b_frames=b_frames,
                    threads=0,
                )
        except av.FFmpegError as error:
            raise RunError(f"{path}: {codec} failed: {error}") from error


def _of_one_size(frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    size = None
    for frame in frames:
        pixels = require_rgb_frames(frame, dims=3)
        size = size or pixels.shape
        if pixels.shape != size:
            raise UsageError(f"a frame of {pixels.shape} follows one of {size}: give one size")
        yield pixels
    if size is None:
        raise UsageError("there are no frames to write: give at least one")


def encode_video_bytes(
    frames: Iterable[np.ndarray], *, fps: float, crf: int, gop: int = 8
) -> bytes:
    """Encodes frames uint8 [H, W, 3] as an MP4 in memory, which `StoredVideo` reads.

    The codec is H.264 without B-frames; odd sizes are padded by repeating the edge. One encoder
    thread gives the same bytes on every machine. Raises RunError if the encoder fails.
    """
    file = io.BytesIO()
    try:
        with av.open(file, "w", format="mp4") as container:
            _encode(
                container,
                frames,
                fps=fps,
                crf=crf,
                codec="libx264",
                chroma="4:2:0",
                gop=gop,
                b_frames=0,
                threads=1,
            )
    except av.FFmpegError as error:
        raise RunError(f"libx264 failed: {error}") from error
    return file.getvalue()


def _encode(
    container, frames: Iterable[np.ndarray], *, fps, crf, codec, chroma, gop, b_frames, threads
):
    rate = exact_frame_rate(fps)
    # With mbtree, x264's bytes depend on its memory addresses.
    options = {} if codec == "ffv1" else {"crf": str(crf), "mbtree": "0"}
    is_yuv = codec == "libx264"
    if is_yuv:
        options |= color.WRITTEN_OPTIONS
    stream = container.add_stream(codec, rate=rate, options=options)
    stream.pix_fmt = _CHROMA[chroma] if codec == "libx264" else _WRITE_FORMATS[codec]
    stream.codec_context.gop_size = gop
    stream.codec_context.max_b_frames = b_frames
    stream.codec_context.thread_count = threads
    if is_yuv:
        stream.codec_context.colorspace = Colorspace.ITU709
        to_yuv = color.FromRgb(stream.pix_fmt)
    for number, pixels in enumerate(frames):
        height, width, _ = pixels.shape
        if stream.pix_fmt == "yuv420p":
            pad = ((0, height % 2), (0, width % 2), (0, 0))
            height, width = height + height % 2, width + width % 2
        if number == 0:
            stream.height, stream.width = height, width
        even = pixels if pixels.shape[:2] == (height, width) else np.pad(pixels, pad, mode="edge")
        if is_yuv:
            frame = to_yuv(even)
        else:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(even), format="rgb24")
        frame.pts, frame.time_base = number, 1 / rate
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
