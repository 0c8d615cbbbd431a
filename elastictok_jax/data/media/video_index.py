"""Indexes a video file: the timestamps of its frames, where decoding can start, and its checks."""

import os
from dataclasses import dataclass
from fractions import Fraction

import av

from elastictok_jax.data.media import containers
from elastictok_jax.data.media.decoding import (
    decoding_frame_size,
    decoding_frame_times,
    open_for_decoding,
)
from elastictok_jax.data.media.file_kinds import file_kind
from elastictok_jax.data.media.files import MediaError, MediaLimits

# One packet is one shown frame and keyframes can be trusted. Other codecs are read in order.
_SEEKABLE_CODECS = frozenset(
    {"h264", "hevc", "vp9", "av1", "mpeg1video", "mpeg2video", "mpeg4", "ffv1", "mjpeg"}
)
# Containers without presentation times, which libav then guesses. Frames are counted instead.
_UNTIMED = frozenset({"avi", "h264", "hevc", "m4v", "mpegvideo", "obu"})
_INTRA_CODECS = frozenset({"ffv1", "mjpeg", "rawvideo"})
# Their data has no long run of zeros: H.264 and HEVC forbid three, in others it wastes bits.
_WITHOUT_ZEROS = frozenset({"h264", "hevc", "vp8", "vp9", "av1"})
_HOLE = bytes(64)  # as left by an incomplete download or a bad sector


@dataclass(frozen=True)
class VideoIndex:
    """The frames of a video file.

    Attributes:
      pts: timestamps in presentation order, in the stream's time base; 0, 1, 2, ... without
        keyframes, where frames can only be counted from the start.
      times: when frames are shown, in ticks of any length.
      keyframes: timestamps at which decoding can start.
      fps: (frames - 1) / (time from the first to the last).
    """

    pts: tuple[int, ...]
    times: tuple[int, ...]
    keyframes: tuple[int, ...]
    fps: float
    is_even: bool
    height: int
    width: int
    has_audio: bool


def index_video(path: str, *, threads: int, limits: MediaLimits) -> VideoIndex:
    """Demuxes a video file once and decodes its first frame; MediaError names what is wrong."""
    if file_kind(path) != "video":
        raise MediaError(f"{path}: an image; a video is needed here")
    container, stream = open_for_decoding(path, threads=threads, limits=limits)
    with container:
        codec = stream.codec_context.codec.canonical_name
        try:
            packets: list[_PacketFacts] = []
            for packet in container.demux(stream):
                if packet.size:
                    packets.append(_PacketFacts.of(packet))
                if codec in _WITHOUT_ZEROS and _HOLE in memoryview(packet).tobytes():
                    raise MediaError(
                        f"{path}: damaged: frame {len(packets) - 1} holds a run of zeros; copy it "
                        "again or delete it"
                    )
                if len(packets) > limits.frames:
                    raise MediaError(
                        f"{path}: more than {limits.frames} frames; cut it into pieces or delete it"
                    )
        except av.FFmpegError as error:
            raise MediaError(
                f"{path}: damaged ({error.strerror}); re-encode or delete it"
            ) from error
        _require_complete(path, container, stream, packets=packets)
        if fault := containers.container_fault(path):
            raise MediaError(f"{path}: {fault}; copy it again, re-encode or delete it")
        stated, tick = float(stream.average_rate or stream.guessed_rate or 0), stream.time_base
        seconds = _seconds(stream, packets)
        if seconds > limits.seconds:
            raise MediaError(
                f"{path}: {seconds:.0f} seconds are more than {limits.seconds:g}; cut it into "
                "pieces or delete it"
            )
        is_timed = container.format.name not in _UNTIMED or codec in _INTRA_CODECS
        has_audio = len(container.streams.audio) > 0
    height, width = decoding_frame_size(path, threads=threads)
    keyframes: tuple[int, ...] = ()
    if is_timed and codec in _SEEKABLE_CODECS and _is_orderly(packets):
        pts = times = tuple(sorted(_known_pts(packets)))
        keyframes = tuple(sorted(_known_pts([packet for packet in packets if packet.is_keyframe])))
    else:
        times = decoding_frame_times(path, threads=threads)
        pts = tuple(range(len(times)))
        if not is_timed or None in times:
            times = pts
            tick = 1 / Fraction(stated).limit_denominator(1001) if stated else Fraction(1, 1)
    fps = _mean_rate(times, stated=stated, tick=tick)
    return VideoIndex(pts, times, keyframes, fps, _is_even(times), height, width, has_audio)


def _mean_rate(times: tuple[int, ...], *, stated: float, tick: Fraction) -> float:
    """Returns (frames - 1) / (time from the first to the last).

    Returns `stated`, which is often more exact, where both agree up to the rounding of times.
    """
    span = float((times[-1] - times[0]) * tick)
    if span <= 0 or (stated and abs((len(times) - 1) / stated - span) <= 2 * tick):
        return stated
    return (len(times) - 1) / span


def _is_even(times: tuple[int, ...]) -> bool:
    """Returns whether every frame is within half a frame of its place at a constant rate."""
    step = (times[-1] - times[0]) / max(1, len(times) - 1)
    return all(
        abs(at - times[0] - number * step) < max(1, step / 2) for number, at in enumerate(times)
    )


def _seconds(stream, packets: list["_PacketFacts"]) -> float:
    times = [packet.end for packet in packets if packet.end is not None]
    return float((max(times) - min(times)) * stream.time_base) if times else 0.0


@dataclass(frozen=True)
class _PacketFacts:
    pts: int | None
    end: int | None
    is_keyframe: bool
    is_shown: bool
    is_corrupt: bool

    @classmethod
    def of(cls, packet: av.Packet) -> "_PacketFacts":
        start = packet.pts if packet.pts is not None else packet.dts
        end = None if start is None else start + (packet.duration or 0)
        return cls(packet.pts, end, packet.is_keyframe, not packet.is_discard, packet.is_corrupt)


def _known_pts(packets: list[_PacketFacts]) -> list[int]:
    return [packet.pts for packet in packets if packet.pts is not None]


def _is_orderly(packets: list[_PacketFacts]) -> bool:
    """Returns whether packets alone tell which frames there are and where decoding can start."""
    pts = _known_pts(packets)
    return (
        len(set(pts)) == len(packets)
        and all(packet.is_shown for packet in packets)
        and packets[0].is_keyframe
        and packets[0].pts == min(pts)
    )


def _require_complete(path: str, container, stream, *, packets: list[_PacketFacts]) -> None:
    """Raises MediaError if the file ends before what its own tables announce."""
    readable = sum(not packet.is_corrupt for packet in packets)
    announced = len(packets)
    size = os.path.getsize(path)
    ends = [packet.end for packet in packets if packet.end is not None]
    entries = stream.index_entries
    if container.format.name == "avi" and ends and max(ends) < stream.frames:
        announced = stream.frames  # its clock counts skipped frames too
    if container.format.name == "gif":
        announced = max(announced, stream.frames)
        if not containers.gif_container_ends_well(path):
            readable = min(readable, len(packets) - 1)
    if "mp4" in container.format.name and len(entries):
        announced = max(announced, len(entries))
        readable = min(readable, sum(entry.pos + entry.size <= size for entry in entries))
    if announced == 0:
        raise MediaError(f"{path}: empty or truncated: no frame is readable; delete it")
    if readable < announced:
        raise MediaError(
            f"{path}: truncated: {readable} of {announced} frames are readable; "
            "re-encode or delete it"
        )
    if size < (expected := containers.container_announced_bytes(path)):
        raise MediaError(
            f"{path}: truncated: {size} of {expected} bytes are there, with "
            f"{readable} frames; re-encode or delete it"
        )
