"""Color is where it was: the phase of a color wave through every way of writing and reading."""

import io
from fractions import Fraction

import av
import numpy as np
import pytest

from elastictok_jax.data import media
from elastictok_jax.data.media import color, raw_video

PERIOD = 24  # pixels
SIZE = 96
BOUND = 0.06  # pixels; a wrong siting is off by 0.5
# Offset of the first chroma sample, right of and below the first luma sample, in luma pixels.
PLACES = {"left": (0, 0.5), "center": (0.5, 0.5), "topleft": (0, 0)}
AXES = pytest.mark.parametrize("axis", [0, 1], ids=["down", "across"])


def strength(at):
    return 50 * np.sin(2 * np.pi * at / PERIOD)


def picture(axis, *, height=SIZE, width=SIZE):
    """Returns constant luma with a wave of red against blue along `axis`."""
    at = np.arange(height)[:, None] if axis == 0 else np.arange(width)[None]
    wave = np.broadcast_to(strength(at), (height, width))
    green = 128 - (0.299 - 0.114) / 0.587 * wave
    return np.dstack([128 + wave, green, 128 - wave]).round().astype(np.uint8)


def planes(axis, siting, *, across=2, down=2, height=SIZE, width=SIZE):
    """Returns the same wave as luma and chroma samples of `siting`, without swscale."""
    right, below = PLACES[siting]
    rows = np.arange(-(-height // down)) * down + (below if down == 2 else 0)
    columns = np.arange(-(-width // across)) * across + (right if across == 2 else 0)
    at = rows[:, None] if axis == 0 else columns[None]
    wave = np.broadcast_to(strength(at), (len(rows), len(columns)))
    luma = np.full((height, width), 126, np.uint8)
    return luma, (128 - wave).round().astype(np.uint8), (128 + wave).round().astype(np.uint8)


def moved(pixels_HWC, axis):
    """Returns the offset of the wave to the right or down, in pixels."""
    red, _, blue = np.moveaxis(pixels_HWC.astype(float), -1, 0)
    line = (red - blue).mean(axis=1 - axis)[PERIOD : PERIOD * (len(pixels_HWC) // PERIOD - 1)]
    at = np.arange(PERIOD, PERIOD + len(line))
    turn = np.exp(-2j * np.pi * at / PERIOD)
    right = np.angle((line * turn).sum() / (strength(at) * turn).sum())
    assert np.abs(line).max() > 50, "there is a wave"
    return -right / (2 * np.pi) * PERIOD


# ---- what is written here


@AXES
@pytest.mark.parametrize("chroma", ["4:2:0", "4:4:4"])
@pytest.mark.parametrize("size", [(SIZE, SIZE), (SIZE + 1, SIZE - 1)])
def test_a_written_video_has_its_color_in_place(tmp_path, axis, chroma, size):
    frame = picture(axis, height=size[0], width=size[1])
    path = tmp_path / "clip.mp4"
    media.write_video(path, np.stack([frame] * 3), fps=10, crf=1, chroma=chroma)
    assert abs(moved(media.read_frames(path)[1, : size[0], : size[1]], axis)) < BOUND


@AXES
@pytest.mark.parametrize("size", [(SIZE, SIZE), (SIZE + 1, SIZE - 1)])
def test_a_stored_video_has_its_color_in_place(axis, size):
    frame = picture(axis, height=size[0], width=size[1])
    data = media.encode_video_bytes(iter([frame] * 3), fps=10, crf=1)
    stored = media.StoredVideo(data, name="stored").read_at([1])[0]
    assert abs(moved(stored[: size[0], : size[1]], axis)) < BOUND


@AXES
@pytest.mark.parametrize("codec", sorted(media.COMPARED_CODECS))
def test_codecs_that_are_compared_with_keep_color_in_place(axis, codec):
    frames = np.stack([picture(axis)] * 2)
    again = media.recompress(frames, fps=10, codec=codec, crf=5)
    assert abs(moved(again.frames[1], axis)) < BOUND


@AXES
def test_chroma_samples_are_written_where_h264_puts_them(tmp_path, axis):
    path = tmp_path / "clip.mp4"
    media.write_video(path, picture(axis)[None], fps=10, crf=0)
    with av.open(str(path)) as container:
        assert color._declares_siting(container.streams.video[0])
        frame = next(container.decode(video=0))
    lines = np.frombuffer(frame.planes[2], np.uint8).reshape(-1, frame.planes[2].line_size)
    red = lines[:, : SIZE // 2].astype(float) - 128
    _, _, expected = planes(axis, "left")
    expected = expected.astype(float) - 128
    scale = (red * expected).sum() / (expected**2).sum()
    assert np.abs(red - scale * expected)[4:-4, 4:-4].max() < 2.5  # center would be off by 6


# ---- files of others


def write(path, parts, *, codec, pixel_format, declared):
    options = {"chroma_sample_location": declared} if declared else {}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = SIZE, SIZE, pixel_format
        stream.codec_context.bit_rate = 8_000_000
        for number in range(2):
            frame = av.VideoFrame(SIZE, SIZE, pixel_format)
            frame.color_range = 2 if pixel_format.startswith("yuvj") else 1
            for plane, samples in zip(frame.planes, parts, strict=True):
                lines = np.zeros((plane.buffer_size // plane.line_size, plane.line_size), np.uint8)
                lines[: samples.shape[0], : samples.shape[1]] = samples
                plane.update(lines.tobytes())
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@AXES
@pytest.mark.parametrize("siting", PLACES)
@pytest.mark.parametrize(
    "kind",
    [
        ("libx264", ".mp4", "yuv420p"),
        ("libx264", ".mkv", "yuvj420p"),
        ("libx265", ".mkv", "yuv420p"),
        ("libvpx", ".webm", "yuv420p"),
        ("libvpx-vp9", ".webm", "yuv420p"),
        ("ffv1", ".mkv", "yuv422p"),
        ("ffv1", ".mkv", "yuv420p"),
        ("rawvideo", ".mkv", "yuv420p"),
    ],
)
def test_what_a_file_declares_is_believed(tmp_path, axis, siting, kind):
    codec, suffix, pixel_format = kind
    path, down = tmp_path / f"clip{suffix}", 1 if "422" in pixel_format else 2
    parts = planes(axis, siting, down=down)
    write(path, parts, codec=codec, pixel_format=pixel_format, declared=siting)
    assert abs(moved(media.read_frames(path)[1], axis)) < BOUND


@AXES
@pytest.mark.parametrize(
    "kind",
    [
        ("libx264", ".mp4", "yuv420p", "left"),
        ("libx264", ".mp4", "yuv444p", "left"),
        ("libx265", ".mkv", "yuv422p", "left"),  # its decoder says that it does not know
        ("libvpx-vp9", ".webm", "yuv420p", "left"),
        ("libvpx-vp9", ".mp4", "yuv420p", "left"),
        ("mpeg2video", ".mpg", "yuv420p", "left"),
        ("mpeg1video", ".mpg", "yuv420p", "center"),
        ("mpeg4", ".avi", "yuv420p", "left"),
        ("wmv2", ".avi", "yuv420p", "left"),  # Matroska does not take it
        ("mjpeg", ".avi", "yuvj420p", "center"),
        ("mjpeg", ".mkv", "yuvj422p", "center"),
        ("ffv1", ".mkv", "yuv420p", "left"),
    ],
)
def test_a_file_that_declares_nothing_is_read_by_convention(tmp_path, axis, kind):
    codec, suffix, pixel_format, siting = kind
    path = tmp_path / f"clip{suffix}"
    across, down = {"420": (2, 2), "422": (2, 1), "444": (1, 1)}[pixel_format[-4:-1]]
    parts = planes(axis, siting, across=across, down=down)
    write(path, parts, codec=codec, pixel_format=pixel_format, declared=None)
    assert abs(moved(media.read_frames(path)[1], axis)) < BOUND


@AXES
@pytest.mark.parametrize("size", [(SIZE, SIZE), (SIZE + 1, SIZE - 1)])
@pytest.mark.parametrize(
    ("words", "layout"),
    [
        ("", ("center", 2, 2)),
        ("C420", ("center", 2, 2)),
        ("C420jpeg", ("center", 2, 2)),
        ("C420mpeg2", ("left", 2, 2)),
        ("C420paldv", ("topleft", 2, 2)),
        ("XYSCSS=420MPEG2", ("left", 2, 2)),
        ("C420jpeg XYSCSS=420JPEG", ("center", 2, 2)),
        ("C420mpeg2 XYSCSS=420JPEG", ("left", 2, 2)),
        ("C422", ("left", 2, 1)),
        ("C422 XCOLORRANGE=FULL", ("center", 2, 1)),
        ("C444", ("left", 1, 1)),
    ],
)
def test_every_name_of_a_y4m_layout_is_believed(axis, size, words, layout):
    (siting, across, down), (height, width) = layout, size
    parts = planes(axis, siting, across=across, down=down, height=height, width=width)
    head = f"YUV4MPEG2 W{width} H{height} F10:1 Ip A1:1 {words}\nFRAME\n".encode()
    stream = io.BytesIO(head + b"".join(part.tobytes() for part in parts))
    (frame,) = raw_video.read_y4m(stream, raw_video.read_y4m_header(stream))
    assert abs(moved(frame, axis)) < BOUND
