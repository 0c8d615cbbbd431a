"""Converts video frames from YUV to upright RGB and back, with exact chroma siting.

A chroma sample of 4:2:0 or 4:2:2 is sited at the left column of its luma samples ("left": H.264,
MPEG-2 and what is written here), at their center ("center": JPEG, MPEG-1) or at their top left
corner ("topleft"). Files declare which; for those that do not, a convention holds. The wrong one
shifts all color by half a pixel.
"""

import io
from fractions import Fraction

import av
import numpy as np
from av.video.reformatter import (
    ColorPrimaries,
    ColorRange,
    Colorspace,
    ColorTrc,
    Interpolation,
    VideoReformatter,
)

from elastictok_jax.data.media.files import MediaError
from elastictok_jax.data.media.geometry import display_matrix, upright

# Rounds instead of truncating: swscale's default darkens frames by more than one level of 255.
EXACT_COLORS = (
    Interpolation.BICUBIC
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.FULL_CHR_H_INP
    | Interpolation.ACCURATE_RND
    | Interpolation.BITEXACT
)
WRITTEN = "left"  # the default of H.264
# For a stream encoded from frames of `FromRgb`, so that the file declares their siting.
WRITTEN_OPTIONS = {"chroma_sample_location": WRITTEN}
_UNTAGGED = (0, 2)
_COLOUR, _SITING_HORZ = b"\x55\xb0", b"\x55\xb7"  # elements of Matroska
_BRIGHTER: dict[int, str] = {ColorTrc.SMPTE2084: "PQ", ColorTrc.ARIB_STD_B67: "HLG"}


class ToRgbPlanes:
    """Converts decoded frames to red, green and blue: uint8 [H, W] each, views of one frame.

    `siting` is the chroma siting of frames that declare none; "" trusts them.
    """

    def __init__(self, siting: str = "") -> None:
        self._sited = _Sited(siting) if siting else None
        self._even = _Even()
        self._reformatter = VideoReformatter()  # keeps its tables from frame to frame

    def __call__(self, frame: av.VideoFrame) -> tuple[np.ndarray, ...]:
        untagged = int(frame.colorspace) in _UNTAGGED
        guess = Colorspace.ITU709 if frame.height >= 720 else Colorspace.ITU601
        sited = frame if self._sited is None else self._sited(frame)
        # The same values as rgb24, in a third of the time.
        planar = self._reformatter.reformat(
            self._even(sited),
            format="gbrp",
            src_colorspace=guess if untagged else None,
            interpolation=EXACT_COLORS,
        )
        green, blue, red = (_lines(plane)[: frame.height, : frame.width] for plane in planar.planes)
        return red, green, blue


class FromRgb:
    """Converts pixels uint8 [H, W, 3] to YUV frames for an encoder: BT.709, chroma WRITTEN."""

    def __init__(self, pixel_format: str) -> None:
        self._format = pixel_format
        self._sited = _Sited(WRITTEN)
        self._reformatter = VideoReformatter()

    def __call__(self, pixels_HWC: np.ndarray) -> av.VideoFrame:
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels_HWC), format="rgb24")
        return self._reformatter.reformat(
            self._sited(frame),  # the result takes its siting from the input
            format=self._format,
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.MPEG,  # the filter marks it as full range, as RGB is
            interpolation=EXACT_COLORS,
        )


class _Sited:
    """Sets the chroma siting of frames, which PyAV can do only by a filter."""

    def __init__(self, siting: str) -> None:
        self._siting = siting
        self._layout: tuple = ()
        self._graph = av.filter.Graph()

    def __call__(self, frame: av.VideoFrame) -> av.VideoFrame:
        layout = (frame.width, frame.height, frame.format.name)
        if layout != self._layout:
            self._layout, self._graph = layout, av.filter.Graph()
            source = self._graph.add_buffer(
                width=frame.width,
                height=frame.height,
                format=frame.format,
                time_base=Fraction(1, 1000),  # any
            )
            sited = self._graph.add("setparams", f"chroma_location={self._siting}")
            self._graph.link_nodes(source, sited, self._graph.add("buffersink")).configure()
        self._graph.push(frame)
        result = self._graph.pull()
        assert isinstance(result, av.VideoFrame)
        return result


class _Even:
    """Pads frames to full chroma samples: swscale stretches odd sizes to the edge.

    The padding at the right and the bottom has arbitrary brightness.
    """

    def __init__(self) -> None:
        self._reformatter = VideoReformatter()

    def __call__(self, frame: av.VideoFrame) -> av.VideoFrame:
        across, down = _samples_served(frame.format)
        if frame.width % across == 0 and frame.height % down == 0:
            return frame
        even = self._reformatter.reformat(  # keeps the frame's metadata
            frame,
            width=-(-frame.width // across) * across,
            height=-(-frame.height // down) * down,
            interpolation=Interpolation.POINT,
        )
        for old, new in zip(frame.planes, even.planes, strict=True):
            lines, target = _lines(old), _lines(new).copy()
            rows, size = min(len(lines), len(target)), min(old.line_size, new.line_size)
            target[:rows, :size] = lines[:rows, :size]
            new.update(target.tobytes())
        return even


def _lines(plane) -> np.ndarray:
    return np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)


def _samples_served(layout: av.VideoFormat) -> tuple[int, int]:
    """Returns how many luma samples, across and down, share one chroma sample."""
    return 64 // layout.chroma_width(64), 64 // layout.chroma_height(64)


def usual_chroma_siting(*, full_range: bool) -> str:
    """Returns the chroma siting of files that declare none: full range comes from JPEG."""
    return "center" if full_range else WRITTEN


def complete_chroma_siting(stream: av.VideoStream) -> str:
    """Makes the frames of a stream declare their chroma siting.

    Must be called before the first frame is decoded. Returns the `siting` for `ToRgbPlanes`.
    """
    context = stream.codec_context
    if context.format is None or context.pix_fmt is None:
        return ""  # not known before decoding
    if _samples_served(context.format) == (1, 1) or _declares_siting(stream):
        return ""
    is_full = context.color_range == ColorRange.JPEG or context.pix_fmt.startswith("yuvj")
    siting = usual_chroma_siting(full_range=is_full)
    if context.name == "hevc":
        return siting  # its decoder resets the option
    context.options = context.options | {"chroma_sample_location": siting}
    return ""


def _declares_siting(stream: av.VideoStream) -> bool:
    """Returns whether the file or its stream declares the chroma siting.

    PyAV does not expose it, but libav writes it into the header of a Matroska file.
    """
    file = io.BytesIO()
    options = {"allow_raw_vfw": "1"}  # for uncompressed streams
    try:
        with av.open(file, "w", format="matroska", options=options) as container:
            container.add_stream_from_template(stream, opaque=True)
            container.start_encoding()
    except (av.FFmpegError, ValueError):
        return False  # no codec that Matroska rejects declares it
    head = file.getvalue()
    at = head.find(_COLOUR)
    return at >= 0 and head.find(_SITING_HORZ, at) >= 0


def hdr_color_note(stream: av.VideoStream) -> str:
    """Returns what is lost of a stream whose brightness or colors exceed a usual screen's."""
    context = stream.codec_context
    transfer = _BRIGHTER.get(context.color_trc)
    if transfer:
        return (
            f"is HDR ({transfer}), which is read without tone mapping, so it looks flat; convert "
            "it to BT.709 first for true colors"
        )
    if context.color_primaries == ColorPrimaries.BT2020:
        return (
            "has the wide colors of BT.2020, which are read as BT.709, so they look dull; convert "
            "it to BT.709 first for true colors"
        )
    return ""


class ToRgb:
    """Converts frames to RGB and applies their rotation. Not thread-safe."""

    def __init__(self, siting: str = "") -> None:
        self._planes = ToRgbPlanes(siting)

    def __call__(self, frame: av.VideoFrame, out_HWC: np.ndarray, *, path) -> None:
        """Writes uint8 [H, W, 3] into `out_HWC`; MediaError if the frame has another size."""
        matrix = display_matrix(frame)
        for channel, plane in enumerate(self._planes(frame)):
            shown = upright(plane, matrix)
            if shown.shape != out_HWC.shape[:2]:
                height, width = out_HWC.shape[:2]
                raise MediaError(
                    f"{path}: the frame size changes from {width}x{height} to "
                    f"{shown.shape[1]}x{shown.shape[0]}; re-encode it at one size"
                )
            out_HWC[..., channel] = shown


def yuv_to_rgb(
    data: bytes, *, pixel_format: str, height: int, width: int, full_range: bool, siting: str
) -> np.ndarray:
    """Converts a planar frame's bytes to uint8 [H, W, 3].

    `pixel_format` is yuv420p, yuv422p, yuv444p or gray, 8 bits a sample; `siting` is as
    above. The matrix is BT.709 from 720 lines on, else BT.601, as for files that name none.
    """
    frame = av.VideoFrame(width, height, pixel_format)
    if full_range:
        frame.color_range = ColorRange.JPEG
    at = 0
    for plane in frame.planes:
        lines = np.zeros((plane.buffer_size // plane.line_size, plane.line_size), np.uint8)
        size = plane.height * plane.width
        samples = np.frombuffer(data, np.uint8, count=size, offset=at)
        lines[: plane.height, : plane.width] = samples.reshape(plane.height, plane.width)
        plane.update(lines.tobytes())
        at += size
    out = np.empty((height, width, 3), np.uint8)
    ToRgb(siting)(frame, out, path="a frame")
    return out
