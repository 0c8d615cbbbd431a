"""Media on real files: exactness, damage, and unusual images."""

import io
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import Colorspace, Interpolation
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin

import elastictok_jax
from elastictok_jax.data import media
from elastictok_jax.data.media import color, decoding
from elastictok_jax.data.media.color import ToRgb
from elastictok_jax.errors import UsageError

EMBEDDED = Path(elastictok_jax.__file__).parent / "data" / "embedded"
CLIPS = sorted(EMBEDDED.glob("*/*.mp4"))
STILLS = sorted(EMBEDDED.glob("*/*.jpg"))
YUV_FORMATS = (
    *("yuv420p", "yuvj420p", "yuv422p", "yuv444p", "yuv411p", "yuva420p", "nv12", "p010le"),
    *("yuyv422", "yuv420p10le", "yuv444p12le"),
)
READS = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


def decode_in_order(path):
    """Decodes every frame sequentially, independently of the code under test."""
    flags = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
    flags |= Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP
    with av.open(str(path)) as container:
        frames = container.decode(video=0)
        return np.stack([f.to_ndarray(format="rgb24", interpolation=flags) for f in frames])


def real_frames(count=48, side=64):
    clip = EMBEDDED / "heldout" / "bbb_busy_flight.mp4"
    return media.resize_shortest(media.read_frames(clip, count=count), side=side)


def remux(source, target, **options):
    """Copies the packets of `source` into another container or layout."""
    with av.open(str(source)) as old, av.open(str(target), "w", options=options) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Writes one short real clip in the layouts in which random access goes wrong."""
    folder = tmp_path_factory.mktemp("media")
    frames = real_frames()
    media.write_video(folder / "short_gop.mp4", frames, fps=24)
    media.write_video(folder / "long_gop.mp4", frames, fps=24, gop=250, b_frames=3)
    media.write_video(folder / "b_frames.mkv", frames, fps=24, gop=12, b_frames=3)
    media.write_video(folder / "lossless.mkv", frames, fps=24, codec="ffv1")
    remux(folder / "long_gop.mp4", folder / "moov_last.mp4")
    remux(folder / "b_frames.mkv", folder / "fragments.mp4", movflags="frag_keyframe+empty_moov")
    pictures = [Image.fromarray(frame) for frame in frames[:12]]
    pictures[0].save(folder / "clip.gif", save_all=True, append_images=pictures[1:], duration=40)
    with av.open(str(folder / "packed.avi"), "w") as container:  # mpeg4 in avi has no timestamps
        stream = container.add_stream("mpeg4", rate=24)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.codec_context.max_b_frames = 2
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return {path.name: path for path in folder.iterdir()}


LAYOUTS = [
    "short_gop.mp4",
    "long_gop.mp4",
    "b_frames.mkv",
    "lossless.mkv",
    "moov_last.mp4",
    "fragments.mp4",
    "clip.gif",
    "packed.avi",
]


# ---- random access


@pytest.mark.parametrize("path", CLIPS, ids=lambda path: path.stem)
def test_embedded_clip_random_access_is_sequential_decoding(path):
    in_order = decode_in_order(path)
    with media.VideoReader(path) as reader:
        assert reader.frame_count == len(in_order) >= 48
        assert (reader.fps, min(reader.height, reader.width)) == (24.0, 144)
        for start in (len(in_order) - 3, 0, 17, 16, 15, 40):  # across and onto keyframes
            np.testing.assert_array_equal(reader.read(start, 3), in_order[start : start + 3])


@pytest.mark.parametrize("name", LAYOUTS)
def test_random_access_is_sequential_decoding(files, name):
    in_order = decode_in_order(files[name])
    with media.VideoReader(files[name]) as reader:
        assert reader.frame_count == len(in_order)

        @READS
        @given(st.data())
        def check(data):
            start = data.draw(st.integers(0, len(in_order)), label="start")
            count = data.draw(st.integers(0, len(in_order) - start), label="count")
            np.testing.assert_array_equal(
                reader.read(start, count), in_order[start : start + count]
            )

        check()


def test_open_gop_mpeg2_random_access(tmp_path):
    # The pictures shown just before a keyframe need the group of pictures that came before it.
    path, frames = tmp_path / "open_gop.mpg", real_frames()
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg2video", rate=24)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = 9, 2
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    in_order = decode_in_order(path)
    for start in range(0, len(in_order) - 1, 2):
        with media.VideoReader(path) as reader:
            np.testing.assert_array_equal(reader.read(start, 2), in_order[start : start + 2])


def test_threads_do_not_change_pixels(files):
    path = files["long_gop.mp4"]
    with media.VideoReader(path, threads=0) as reader:
        np.testing.assert_array_equal(reader.read(0, reader.frame_count), decode_in_order(path))


@pytest.mark.parametrize(
    "pixel_format",
    [*YUV_FORMATS, "gray", "gray10le", "rgb24", "bgr0", "rgba", "gbrp"],
)
def test_planes_give_the_pixels_of_swscales_exact_rgb(pixel_format):
    picture = np.ascontiguousarray(media.read_frames(CLIPS[0], count=1)[0, :-4, :-4])
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixel_format)
    options = dict(src_colorspace=Colorspace.ITU601, interpolation=color.EXACT_COLORS)
    expected = frame.to_ndarray(format="rgb24", **options)
    pixels = np.empty_like(expected)
    ToRgb()(frame, pixels, path="")
    np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize("pixel_format", [name for name in YUV_FORMATS if name != "yuyv422"])
@pytest.mark.parametrize(("height", "width"), [(75, 93), (74, 95), (73, 96)])
def test_an_odd_size_moves_no_pixel(pixel_format, height, width):
    picture = np.ascontiguousarray(media.read_frames(CLIPS[0], count=1)[0, :76, :96])
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixel_format)

    def corner(height, width):
        graph = av.filter.Graph()
        source = graph.add_buffer(width=96, height=76, format=pixel_format, time_base="1/10")
        crop = graph.add("crop", f"{width}:{height}:0:0:exact=1")
        graph.link_nodes(source, crop, graph.add("buffersink")).configure()
        graph.push(frame)
        pixels = np.empty((height, width, 3), np.uint8)
        ToRgb()(graph.pull(), pixels, path="")
        return pixels

    across = 4 if pixel_format == "yuv411p" else 2
    full = corner(-(-height // 2) * 2, -(-width // across) * across)  # of the same chroma samples
    np.testing.assert_array_equal(corner(height, width), full[:height, :width])


@pytest.mark.parametrize(("start", "count"), [(-1, 1), (47, 2), (49, 0), (0, -1)])
def test_frames_out_of_range_are_refused(files, start, count):
    with (
        media.VideoReader(files["short_gop.mp4"]) as reader,
        pytest.raises(media.MediaError, match="0 to 47"),
    ):
        reader.read(start, count)


def test_display_matrix_turns_the_frames(files, tmp_path):
    upright = files["short_gop.mp4"].read_bytes()
    # The 3x3 matrix of the track header, 16.16 fixed point: a quarter turn clockwise.
    one, minus = (65536).to_bytes(4, "big"), (-65536).to_bytes(4, "big", signed=True)
    zero, last = bytes(4), (1 << 30).to_bytes(4, "big")
    identity = one + zero * 3 + one + zero * 3 + last
    turn = zero + one + zero + minus + zero * 4 + last
    at = upright.index(identity, upright.index(b"tkhd"))
    path = tmp_path / "turned.mp4"
    path.write_bytes(upright[:at] + turn + upright[at + len(turn) :])
    expected = np.rot90(decode_in_order(files["short_gop.mp4"]), -1, axes=(1, 2))
    np.testing.assert_array_equal(media.read_frames(path), expected)
    info = media.probe(path)
    assert (info.height, info.width) == expected.shape[1:3]


# ---- damage


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("kept", [0.02, 0.25, 0.5, 0.75, 0.95, 1.0])
def test_truncation_is_an_error_and_never_wrong_frames(files, tmp_path, name, kept):
    whole = files[name].read_bytes()
    path = tmp_path / f"cut{files[name].suffix}"
    path.write_bytes(whole[: min(int(len(whole) * kept), len(whole) - 1)])
    try:
        media.probe(path)
        frames = media.read_frames(path)
    except media.MediaError as error:
        assert str(error).startswith(str(path)), "the message names the file"
        assert "delete it" in str(error), "and the fix"
    else:  # only bytes after the last frame are gone
        np.testing.assert_array_equal(frames, decode_in_order(files[name]))


def test_truncated_mp4_says_how_much_is_left(files, tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(files["short_gop.mp4"].read_bytes()[:-2000])
    with pytest.raises(media.MediaError, match=r"clip\.mp4: truncated: \d+ of 48 frames are read"):
        media.probe(path)


def test_mp4_without_its_frame_table(files, tmp_path):
    path = tmp_path / "clip.mp4"
    whole = files["moov_last.mp4"].read_bytes()
    path.write_bytes(whole[: whole.rindex(b"moov") - 4])
    with pytest.raises(media.MediaError, match="moov"):
        media.probe(path)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".gif", ".avi", ".mpg", ".png", ".jpg"])
def test_what_is_not_media_is_refused(tmp_path, suffix):
    path = tmp_path / f"file{suffix}"
    with pytest.raises(media.MediaError, match="no such file"):
        media.probe(path)
    path.write_bytes(b"")
    with pytest.raises(media.MediaError, match="empty"):
        media.probe(path)
    path.write_text("Not a picture, whatever the name says.\n" * 50)
    with pytest.raises(media.MediaError, match="suffix"):
        media.probe(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(media.MediaError, match="not a file"):
        media.probe(path)


def test_sound_alone_is_no_video(tmp_path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        tone = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        tone.sample_rate = 8000
        container.mux(stream.encode(tone))
        container.mux(stream.encode(None))
    with pytest.raises(media.MediaError, match="no video"):
        media.probe(path)


def test_unknown_suffix_names_the_known_ones(tmp_path):
    with pytest.raises(media.MediaError, match=r"\.mp4"):
        media.probe(tmp_path / "notes.txt")


# ---- writing video


@pytest.mark.parametrize(
    ("name", "codec"),
    [("clip.mkv", "ffv1"), ("clip.mp4", "libx264rgb"), ("clip.mkv", "libx264rgb")],
)
@pytest.mark.parametrize("crop", [(64, 96), (63, 95)])
def test_lossless_round_trip(tmp_path, name, codec, crop):
    frames = media.center_crop(real_frames(count=8), height=crop[0], width=crop[1])
    media.write_video(tmp_path / name, frames, fps=30, crf=0, codec=codec)
    np.testing.assert_array_equal(media.read_frames(tmp_path / name), frames)


def test_x264_keeps_colors_and_pads_odd_sizes(tmp_path):
    frames = media.read_frames(EMBEDDED / "heldout" / "bbb_static_skyline.mp4", count=10)
    frames = frames[:, :-1, :-1]
    media.write_video(tmp_path / "clip.mp4", frames, fps=24000 / 1001, crf=4)
    info = media.probe(tmp_path / "clip.mp4")
    assert (info.frames, info.height, info.width) == (10, 144, 256)
    assert info.fps == pytest.approx(24000 / 1001, abs=1e-6)
    error = media.read_frames(tmp_path / "clip.mp4")[:, :-1, :-1].astype(float) - frames
    assert np.abs(error).mean() < 1.5
    assert np.abs(error.mean((0, 1, 2))).max() < 0.25, (
        "a color shift: a wrong YUV matrix or cut-off"
    )


def test_frames_one_after_the_other_are_written_as_an_array_is(tmp_path):
    frames = real_frames(count=5)[:, :33, :47]
    for name, source in [("array.mp4", frames), ("frames.mp4", iter(frames))]:
        media.write_video(tmp_path / name, source, fps=24, crf=4, chroma="4:4:4")
    read = media.read_frames(tmp_path / "frames.mp4")
    np.testing.assert_array_equal(read, media.read_frames(tmp_path / "array.mp4"))
    assert read.shape == frames.shape  # odd sizes are kept
    assert np.abs(read.astype(float) - frames).mean() < 1.5
    with pytest.raises(UsageError, match="give one size"):
        media.write_video(tmp_path / "no.mp4", iter([frames[0], frames[1, 1:]]), fps=24)
    with pytest.raises(UsageError, match="no frames to write"):
        media.write_video(tmp_path / "no.mp4", iter([]), fps=24)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["array.mp4", "frames.mp4"]


def test_sound_and_uneven_times_are_noticed(files):
    for name in ("short_gop.mp4", "b_frames.mkv", "clip.gif", "packed.avi"):
        with media.VideoReader(files[name]) as reader:
            assert (reader.has_audio, reader.evenly_spaced) == (False, True)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"old")
    with pytest.raises(UsageError, match="uint8"):
        media.write_video(path, np.zeros((2, 8, 8, 3), np.float32), fps=24)
    with pytest.raises(UsageError, match="fps"):
        media.write_video(path, np.zeros((2, 8, 8, 3), np.uint8), fps=0)
    with pytest.raises(UsageError, match="mkv"):
        media.write_video(path, np.zeros((2, 8, 8, 3), np.uint8), fps=24, codec="ffv1")
    with pytest.raises(UsageError, match="folder"):
        media.write_video(tmp_path / "no" / "x.mp4", np.zeros((2, 8, 8, 3), np.uint8), fps=24)
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]
    assert path.read_bytes() == b"old"


# ---- images


@pytest.mark.parametrize("suffix", [".png", ".bmp"])
def test_image_round_trip(tmp_path, suffix):
    image = media.read_image(STILLS[0])
    media.write_image(tmp_path / f"a{suffix}", image)
    np.testing.assert_array_equal(media.read_image(tmp_path / f"a{suffix}"), image)
    np.testing.assert_array_equal(media.read_frames(tmp_path / f"a{suffix}"), image[None])
    assert [p.name for p in tmp_path.iterdir()] == [f"a{suffix}"]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    upright = media.read_image(STILLS[0])[:40, :60]
    stored = {  # how a camera stores the picture that this tag turns upright
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(media.read_image(tmp_path / "a.png"), upright)


def test_grey_palette_alpha_and_sixteen_bits(tmp_path):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    wide = np.repeat(grey[..., None], 3, axis=2)
    path = tmp_path / "a.png"

    Image.fromarray(grey).save(path)
    np.testing.assert_array_equal(media.read_image(path), wide)

    Image.fromarray(wide).quantize(256).save(path)
    assert Image.open(path).mode == "P"
    np.testing.assert_array_equal(media.read_image(path), wide)

    Image.fromarray(grey.astype(np.uint16) * 257).save(path)
    np.testing.assert_array_equal(media.read_image(path), wide)

    layer = np.dstack([wide, np.zeros((16, 16), np.uint8)])
    layer[:8, :, 3] = 255
    Image.fromarray(layer).save(path)
    np.testing.assert_array_equal(media.read_image(path)[:8], wide[:8])
    assert (media.read_image(path)[8:] == 255).all()

    grey_layer = Image.merge("LA", [Image.fromarray(grey), Image.new("L", (16, 16), 0)])
    grey_layer.save(path)
    assert (media.read_image(path) == 255).all()


def test_truncated_image(tmp_path):
    path = tmp_path / "a.jpg"
    whole = STILLS[0].read_bytes()
    for kept in (20, 400, len(whole) // 2, len(whole) - 500):
        path.write_bytes(whole[:kept])
        with pytest.raises(media.MediaError, match="delete it"):
            media.read_image(path)


@pytest.mark.parametrize("size", [(9000, 9000), (20000, 20000)])
def test_decompression_bomb(tmp_path, size):
    path = tmp_path / "bomb.png"
    Image.new("1", size).save(path)
    assert path.stat().st_size < 100_000
    with pytest.raises(media.MediaError, match="pixels"):
        media.read_image(path)


def test_the_limit_on_pixels_is_ours_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # an error above twice as many
    image = media.read_image(STILLS[0])[:40, :60]
    media.write_image(tmp_path / "a.png", image)
    np.testing.assert_array_equal(media.read_image(tmp_path / "a.png"), image)
    data = (tmp_path / "a.png").read_bytes()
    np.testing.assert_array_equal(media.decode_image(data, name="a"), image)
    with pytest.raises(media.MediaError, match="60x40 is more than 2399 pixels"):
        media.read_image(tmp_path / "a.png", limits=media.MediaLimits(pixels=2399))
    with pytest.raises(media.MediaError, match="a: 60x40 is more than 2399 pixels"):
        media.decode_image(data, name="a", limits=media.MediaLimits(pixels=2399))
    assert Image.MAX_IMAGE_PIXELS == 500


def test_a_video_above_the_usual_limit_is_read_with_another(tmp_path, monkeypatch):
    frames = real_frames(count=2)
    media.write_video(tmp_path / "a.mp4", frames, fps=24)
    usual = media.MediaLimits(pixels=100)
    monkeypatch.setattr(decoding, "LIMITS", usual)
    with media.VideoReader(tmp_path / "a.mp4", limits=media.MediaLimits(pixels=10**6)) as reader:
        assert reader.read(0, 2).shape == frames.shape
    with pytest.raises(media.MediaError, match="more than 100 pixels"):
        media.VideoReader(tmp_path / "a.mp4", limits=usual)


def test_a_frame_beyond_the_limit_is_not_decoded_though_the_first_is_small(tmp_path, monkeypatch):
    path = tmp_path / "grows.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuvj420p"
        for number, side in enumerate((32, 4000)):
            file = io.BytesIO()
            Image.new("RGB", (side, side)).save(file, "JPEG")
            packet = av.Packet(file.getvalue())
            packet.stream, packet.pts, packet.dts = stream, number, number
            packet.time_base, packet.is_keyframe = Fraction(1, 10), True
            container.mux(packet)
    with pytest.raises(media.MediaError, match="frame size changes from 32x32 to 4000x4000"):
        media.read_frames(path)
    monkeypatch.setattr(decoding, "LIMITS", media.MediaLimits(pixels=10**6))
    with pytest.raises(media.MediaError, match="damaged after 1 frames"):
        media.read_frames(path)


def test_a_png_with_much_text_is_read(tmp_path):
    image, text = media.read_image(STILLS[0])[:40, :60], PngImagePlugin.PngInfo()
    text.add_text("workflow", "node " * 500_000, zip=True)  # 2.5 MB, as image generators leave
    Image.fromarray(image).save(tmp_path / "a.png", pnginfo=text)
    before = PngImagePlugin.MAX_TEXT_CHUNK
    np.testing.assert_array_equal(media.read_image(tmp_path / "a.png"), image)
    assert before == PngImagePlugin.MAX_TEXT_CHUNK


def test_pillow_prints_no_warning_of_its_own(tmp_path):
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x1a\x01\x05\0\x01\0\0\0\xff\xff\0\0"
    Image.open(STILLS[0]).save(tmp_path / "a.jpg", exif=exif)  # it points to behind its end
    code = "import sys; from elastictok_jax.data import media; media.read_image(sys.argv[1])"
    ours = subprocess.run(
        [sys.executable, "-W", "default", "-c", code, str(tmp_path / "a.jpg")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert ours.stderr == ""
    with pytest.warns(UserWarning, match="Truncated"), Image.open(tmp_path / "a.jpg"):
        pass


# ---- contents under another suffix


@pytest.fixture(scope="module")
def contents(files, tmp_path_factory):
    """Writes a file of each kind of content; returns them with their pixels."""
    folder, photo = tmp_path_factory.mktemp("contents"), Image.open(STILLS[0]).crop((0, 0, 60, 40))
    for suffix in (".jpg", ".png", ".webp", ".bmp"):
        photo.save(folder / f"a{suffix}")
    paths = [*folder.iterdir(), *(files[n] for n in ("short_gop.mp4", "b_frames.mkv", "clip.gif"))]
    return {path: media.read_frames(path, count=1) for path in paths}


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".bmp", ".gif", ".mp4", ".webm"])
def test_what_is_in_a_file_decides_how_it_is_read(contents, tmp_path, suffix):
    for path, expected in contents.items():
        renamed = tmp_path / f"{path.stem}-{path.suffix[1:]}{suffix}"
        renamed.write_bytes(path.read_bytes())
        info = media.probe(renamed)
        assert info.kind == media.probe(path).kind == media.file_kind(renamed)
        np.testing.assert_array_equal(media.read_frames(renamed, count=1), expected)


def test_what_cannot_be_read_is_called_what_it_is(files, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200))
    with pytest.raises(
        media.MediaError, match=r"a\.jpg: HEIC is not supported; convert it to PNG or"
    ):
        media.read_image(tmp_path / "a.jpg")
    with pytest.raises(media.MediaError, match=r"short_gop\.mp4: a video; an image is needed"):
        media.read_image(files["short_gop.mp4"])
    (tmp_path / "b.gif").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(200))
    with pytest.raises(media.MediaError, match=r"b\.gif: a damaged PNG"):
        media.read_image(tmp_path / "b.gif")
    with pytest.raises(media.MediaError, match="an image; a video is needed"):
        media.VideoReader(tmp_path / "b.gif")
    Image.new("F", (8, 8), 0.5).save(tmp_path / "c.jpg", "TIFF")
    with pytest.raises(media.MediaError, match=r"c\.jpg: its pixels are floats .* 8 bits"):
        media.read_image(tmp_path / "c.jpg")


# ---- what is lost


def tagged(path, *, transfer, primaries):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p10le"
        stream.codec_context.color_trc = transfer
        stream.codec_context.color_primaries = primaries
        stream.codec_context.colorspace = 9  # BT.2020, non-constant luminance
        frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 99, np.uint8), format="rgb24")
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.mark.parametrize(
    ("transfer", "primaries", "said"),
    [(16, 9, "HDR (PQ)"), (18, 9, "HDR (HLG)"), (14, 9, "BT.2020"), (1, 1, "")],
)
def test_color_beyond_a_usual_screen_is_said_to_be_lost(tmp_path, transfer, primaries, said):
    tagged(tmp_path / "a.mp4", transfer=transfer, primaries=primaries)
    assert media.read_frames(tmp_path / "a.mp4").shape == (1, 64, 64, 3)
    loss = media.probe_media_loss(tmp_path / "a.mp4")
    assert said in loss and bool(said) == bool(loss)


@pytest.mark.parametrize(("suffix", "lost"), [(".webp", True), (".png", True), (".gif", False)])
def test_of_a_picture_that_moves_the_first_frame_is_read_and_the_rest_is_said_to_be_lost(
    tmp_path, suffix, lost
):
    path, pictures = tmp_path / f"a{suffix}", [Image.fromarray(f) for f in real_frames(count=3)]
    pictures[0].save(path)
    assert media.probe_media_loss(path) == ""
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=40)
    assert media.probe_media_loss(path) == (
        "is an animation: only the first of its 3 frames is read" if lost else ""
    )
    assert len(media.read_frames(path)) == (1 if lost else 3)


# ---- geometry


def test_what_would_be_scaled_beyond_the_limit_is_refused_before_it_is_made(files):
    strip = np.zeros((1, 1, 65500, 3), np.uint8)
    with pytest.raises(media.MediaError, match=r"a\.png: 65500x1 scaled .* more than 67108864 pix"):
        media.resize_shortest(strip, side=256, name="a.png")
    path = files["short_gop.mp4"]
    with (
        media.VideoReader(path) as reader,
        pytest.raises(media.MediaError, match=rf"{path}: 114x64 scaled to 10000 .* 17812x10000"),
    ):
        reader.read(0, 1, side=10000)
    assert media.resize_shortest(strip[:, :, :2000], side=100).shape == (1, 100, 200_000, 3)


def test_the_ends_of_a_strip_are_not_scaled_up(tmp_path):
    strip = real_frames(count=3)[:, :8]  # 114 x 8, longer than four times its width
    np.testing.assert_array_equal(media.crop_long_strip(strip, longest=4), strip[:, :, 41:73])
    np.testing.assert_array_equal(
        media.crop_long_strip(strip.transpose(0, 2, 1, 3), longest=4)[0],
        strip[0, :, 41:73].swapaxes(0, 1),
    )
    assert media.crop_long_strip(strip, longest=16).shape == strip.shape
    media.write_video(tmp_path / "a.mkv", strip, fps=24, codec="ffv1")
    with media.VideoReader(tmp_path / "a.mkv") as reader:
        np.testing.assert_array_equal(
            reader.read_at([0, 2], side=24, longest=4),
            media.resize_shortest(strip[[0, 2], :, 41:73], side=24),
        )
        np.testing.assert_array_equal(reader.read_at([1], longest=4), strip[1:2, :, 41:73])


def test_resize_and_crop():
    frames = media.read_frames(CLIPS[0], count=2)
    assert media.resize_shortest(frames, side=144) is frames
    small = media.resize_shortest(frames, side=36)
    assert small.shape == (2, 36, 64, 3)
    assert media.resize_shortest(frames.transpose(0, 2, 1, 3), side=36).shape == (2, 64, 36, 3)
    boxes = frames.reshape(2, 36, 4, 64, 4, 3).mean((2, 4))
    assert np.abs(boxes - small).mean() < 4, "antialiased: near the mean of what it covers"
    crop = media.center_crop(frames, height=100, width=56)
    np.testing.assert_array_equal(crop, frames[:, 22:122, 100:156])
    with pytest.raises(UsageError, match="resize first"):
        media.center_crop(frames, height=145, width=56)
    with pytest.raises(UsageError, match="side"):
        media.resize_shortest(frames, side=0)


# ---- what ships


def test_embedded_files_are_whole_listed_and_small():
    sources = (EMBEDDED / "SOURCES.md").read_text(encoding="utf-8")
    for path in CLIPS + STILLS:
        media.probe(path)
        assert path.relative_to(EMBEDDED).as_posix() in sources
    assert sum(path.stat().st_size for path in CLIPS + STILLS) < 5_500_000
    assert len(list((EMBEDDED / "train").iterdir())) >= 24
    assert len(list((EMBEDDED / "heldout").iterdir())) >= 7


def encoded(image: Image.Image, form: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


PHOTO = Image.open(EMBEDDED / "heldout" / "photo_chelsea.jpg")


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"turn": 6}])
def test_pictures_in_memory_are_as_pillow_has_them(mode, options):
    options = dict(options)
    if options.pop("turn", None):
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = 6
    data = encoded(PHOTO.convert(mode), **options)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    pixels = media.decode_image(data, name="picture")
    np.testing.assert_array_equal(pixels, np.asarray(expected))


@settings(max_examples=150)
@given(st.integers(0, 10**6), st.integers(0, 255), st.booleans())
def test_a_damaged_picture_in_memory_is_an_error_or_as_pillow_has_it(place, value, cut):
    data = bytearray(encoded(PHOTO.resize((40, 30))))
    place %= len(data)
    data[place] = value
    damaged = bytes(data[:place] if cut else data)
    try:
        pixels = media.decode_image(damaged, name="picture")
    except media.MediaError as error:
        assert str(error).startswith("picture: ")
    else:
        shown = ImageOps.exif_transpose(Image.open(io.BytesIO(damaged))).convert("RGB")
        np.testing.assert_array_equal(pixels, np.asarray(shown))
