"""Encodes clips with standard codecs and decodes them again, for comparisons of size."""

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO

import av
import numpy as np
from av.bitstream import BitStreamFilterContext
from av.video.reformatter import Colorspace

from elastictok_jax.data.frame_rate import exact_frame_rate
from elastictok_jax.data.media.color import WRITTEN_OPTIONS, FromRgb, ToRgb
from elastictok_jax.data.media.geometry import require_rgb_frames
from elastictok_jax.errors import RunError, UsageError

# Slow presets: the best that these codecs can do.
_CODEC_OPTIONS = {"libx264": {"preset": "veryslow"}, "libsvtav1": {"preset": "4"}}
COMPARED_CODECS = {"libx264": 51, "libsvtav1": 63}  # the highest (coarsest) crf of each
_ABOUT_THE_ENCODER = "filter_units=remove_types=6"  # H.264 SEI: x264 lists its options there


@dataclass(frozen=True)
class Recompressed:
    """A clip that a codec has encoded and decoded.

    Attributes:
      frames: uint8 [T, H, W, 3].
      stream_bytes: of the codec's stream alone, without container and encoder metadata.
    """

    frames: np.ndarray
    stream_bytes: int


def recompress(frames_THWC, *, fps: float, codec: str, crf: int) -> Recompressed:
    """Encodes and decodes frames uint8 [T, H, W, 3] of even sizes by a codec of COMPARED_CODECS.

    The stream is 4:2:0 and BT.709, one long group of pictures with B-frames: the codec at its
    best. Raises UsageError for bad arguments and RunError if the codec fails.
    """
    frames_THWC = require_rgb_frames(frames_THWC, dims=4)
    count, height, width, _ = frames_THWC.shape
    if not 0 <= crf <= COMPARED_CODECS.get(codec, -1):
        raise UsageError(
            f"codec {codec!r} with crf {crf}: choose one of {COMPARED_CODECS} (codec: highest crf)"
        )
    if height % 2 or width % 2 or not fps > 0:
        raise UsageError(f"{width}x{height} at {fps} frames a second: crop to even sizes, fps > 0")
    file = io.BytesIO()
    try:
        # SVT-AV1, run by root, gives the thread that calls it real-time priority for good, and with
        # it all threads and processes that this one starts later.
        with ThreadPoolExecutor(1) as own_thread:
            encoding = partial(_encode_for_size, frames_THWC, fps=fps, codec=codec, crf=crf)
            own_thread.submit(encoding, file).result()
        out = np.empty_like(frames_THWC)
        to_rgb = ToRgb()
        with av.open(io.BytesIO(file.getvalue()), "r") as container:
            decoded = 0
            for frame in container.decode(video=0):
                to_rgb(frame, out[decoded], path=codec)
                decoded += 1
        with av.open(io.BytesIO(file.getvalue()), "r") as container:
            stream = container.streams.video[0]
            sizes = [len(stream.codec_context.extradata or b"")]
            sizes += [packet.size for packet in _packets_of_pictures(container, stream)]
    except (av.FFmpegError, IndexError) as error:
        raise RunError(f"{codec} failed: {error}") from error
    if decoded != count:
        raise RunError(f"{codec} returned {decoded} of {count} frames")
    return Recompressed(out, sum(sizes))


def _encode_for_size(frames_THWC: np.ndarray, file: BinaryIO, *, fps, codec, crf) -> None:
    rate = exact_frame_rate(fps)
    options = {"crf": str(crf)} | _CODEC_OPTIONS[codec] | WRITTEN_OPTIONS
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = frames_THWC.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = len(frames_THWC)
        stream.codec_context.colorspace = Colorspace.ITU709
        to_yuv = FromRgb(stream.pix_fmt)
        for number, pixels in enumerate(frames_THWC):
            frame = to_yuv(pixels)
            frame.pts, frame.time_base = number, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _packets_of_pictures(container, stream) -> Iterator[av.Packet]:
    if stream.codec_context.name != "h264":
        yield from container.demux(stream)
        return
    clean = BitStreamFilterContext(_ABOUT_THE_ENCODER, stream)
    for packet in container.demux(stream):
        yield from clean.filter(packet if packet.size else None)
