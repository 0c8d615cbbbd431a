"""`elastictok encode` and `decode` on real files and pipes, with a small random model."""

import contextlib
import io
import json
import os
import subprocess
import sys
import threading
from fractions import Fraction

import av
import jax
import numpy as np
import pytest
from PIL import Image

from elastictok_jax import ElasticTokenizer, Tokens, cli
from elastictok_jax.config import (
    apply_overrides,
    config_to_json,
    default_config,
    default_source_config,
    resolve_config,
)
from elastictok_jax.data import media
from elastictok_jax.data.clip_reader import ClipReader
from elastictok_jax.data.frame_stream import FrameStream, open_frame_stream
from elastictok_jax.data.media import raw_video
from elastictok_jax.data.packing import PackedClip
from elastictok_jax.data.sources.file_source import EMBEDDED, FileSource
from elastictok_jax.data.sources.splits import SourceSplit
from elastictok_jax.pixels import pixel_mse
from elastictok_jax.storage.safetensors import save_safetensors
from elastictok_jax.tokenizer import etok
from elastictok_jax.tokenizer.file_codec import _encode_in_order
from elastictok_jax.tokenizer.goal import Goal
from elastictok_jax.tokenizer.search import SEARCHES
from tests.tiny import made_up_state

SMALL = {
    **{"model.width": 16, "model.mlp_width": 16, "model.heads": 1, "compute.dtype": "float32"},
    **{"model.encoder_layers": 1, "model.decoder_layers": 1, "model.patch": (2, 8, 8)},
    **{"video.resolution": 16, "masking.min_tokens": 1, "data.sequence_blocks": 2},
}  # 8 tokens a block of 4 frames


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    config = default_config()
    apply_overrides(config, SMALL)
    config = resolve_config(config)
    (folder / "config.json").write_text(config_to_json(config))
    params = jax.device_get(made_up_state(config).params["model"])
    save_safetensors(folder / "model.safetensors", params, metadata={})
    return folder


@pytest.fixture(scope="module")
def tokenizer(model):
    return ElasticTokenizer.from_pretrained(model)


@pytest.fixture
def encode(model, tmp_path, capsys):
    """Encodes to clip.etok; gives results, tokens, and stderr."""

    def run(source, *words, goal=("--tokens", "3")):
        path = tmp_path / "clip.etok"
        command = ["encode", str(source), "-o", str(path), "--model", str(model), "--json"]
        assert cli.main([*command, *goal, *words]) == 0
        captured = capsys.readouterr()
        results = json.loads(captured.out)
        assert results["file_bytes"] == path.stat().st_size
        return results, Tokens.load(path), captured.err

    return run


@pytest.fixture
def decode(model, tmp_path, capsys):
    def run(name):
        words = ["decode", tmp_path / "clip.etok", "-o", tmp_path / name, "--model", model]
        assert cli.main([str(word) for word in words]) == 0
        capsys.readouterr()
        return tmp_path / name

    return run


@pytest.fixture
def refused(model, capsys):
    """Runs a verb with the model; it must end with `status` and one line, which is returned."""

    def run(*words, status=2):
        assert cli.main([*map(str, words), "--model", str(model)]) == status
        *notes, line = capsys.readouterr().err.splitlines()
        assert not notes
        assert line.startswith("elastictok: error: ")
        return line

    return run


def assert_codes(tokens, expected):
    assert (tokens.frames, tokens.height, tokens.width) == (
        expected.frames,
        expected.height,
        expected.width,
    )
    np.testing.assert_array_equal(tokens.lengths, expected.lengths)
    np.testing.assert_array_equal(np.concatenate(tokens.codes), np.concatenate(expected.codes))


def footage(count, *, height=16, width=16):
    frames = media.read_frames(EMBEDDED / "heldout" / "bbb_busy_flight.mp4", count=count)
    return np.ascontiguousarray(frames[:, 40 : 40 + height, 90 : 90 + width])


# ---- what a picture may be


def test_transparency_is_laid_over_white(tokenizer, encode, decode, tmp_path):
    rgba = np.random.default_rng(0).integers(0, 256, (16, 20, 4), dtype=np.uint8)
    rgba[:8, :, 3], rgba[8:, :, 3] = 0, 255
    Image.fromarray(rgba).save(tmp_path / "in.png")
    expected = rgba[..., :3].copy()
    expected[:8] = 255
    results, tokens, _ = encode(tmp_path / "in.png")
    assert_codes(tokens, tokenizer.encode(expected, tokens=3))
    assert (results["frames"], results["fps"], tokens.fps) == (1, 0.0, 0.0)
    assert results["layout"] == "20x16 is coded in 1x2 tiles of 16x16, padded to 32x16"
    picture = np.asarray(Image.open(decode("out.png")))
    np.testing.assert_array_equal(picture, tokenizer.decode(tokens)[0])
    assert Image.open(decode("out.jpg")).size == (20, 16)


def test_grey_and_turned_pictures(tokenizer, encode, tmp_path):
    grey = np.random.default_rng(1).integers(0, 256, (9, 7), dtype=np.uint8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    _, tokens, _ = encode(tmp_path / "grey.png")
    assert_codes(tokens, tokenizer.encode(np.stack([grey] * 3, axis=-1), tokens=3))
    picture = Image.fromarray(footage(1, height=24, width=40)[0])
    exif = Image.Exif()
    exif[0x0112] = 6  # shown a quarter turn clockwise
    picture.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    results, tokens, _ = encode(tmp_path / "turned.jpg")
    stored = np.asarray(Image.open(tmp_path / "turned.jpg"))
    assert_codes(tokens, tokenizer.encode(np.rot90(stored, -1), tokens=3))
    assert (results["width"], results["height"]) == (24, 40)


# ---- what a video may be


def write(path, frames, *, times=None, audio=False):
    """A video by av alone: `times` in milliseconds, a second of sound."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1" if path.suffix == ".mkv" else "libx264", rate=10)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "bgr0" if path.suffix == ".mkv" else "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        if audio:
            sound = container.add_stream("aac", rate=8000, layout="mono")
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = times[number] if times else number * 100
            frame.time_base = Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if audio:
            wave = av.AudioFrame.from_ndarray(
                np.zeros((1, 8000), np.float32), format="fltp", layout="mono"
            )
            wave.rate = 8000
            container.mux(sound.encode(wave))
            container.mux(sound.encode(None))
    return path


def test_odd_size_longer_than_the_window(tokenizer, encode, decode, tmp_path):
    """As a stream, a window of 2 blocks, 18 frames: 5 blocks, the last one short."""
    frames = footage(18, height=17, width=31)
    results, tokens, notes = encode(write(tmp_path / "in.mkv", frames), goal=("--max-mse", "0.9"))
    expected = tokenizer.encode(frames, max_mse=0.9)
    assert_codes(tokens, expected)
    np.testing.assert_array_equal(tokens.met, expected.met)
    assert results["layout"] == "31x17 is coded in 2x2 tiles of 16x16, padded to 32x32"
    assert notes == f"note: {results['layout']}\n"
    assert (tokens.window_blocks, tokens.fps) == (2, 10.0)
    assert results["blocks"] == 5 * 4
    decoded = tokenizer.decode(tokens)
    assert results["mse"] == pytest.approx(pixel_mse(frames, decoded), rel=1e-5)
    np.testing.assert_array_equal(media.read_frames(decode("out.mkv")), decoded)
    info = media.probe(decode("out.mp4"))
    assert (info.frames, info.height, info.width, info.fps) == (18, 17, 31, 10.0)
    near = media.read_frames(tmp_path / "out.mp4").astype(float) - decoded
    assert np.abs(near).mean() < 6  # x264 on noise
    decode("frame-%03d.png")
    names = sorted(path.name for path in tmp_path.glob("frame-*"))
    assert names == [f"frame-{number:03}.png" for number in range(18)]
    np.testing.assert_array_equal(media.read_image(tmp_path / "frame-017.png"), decoded[17])


def test_turned_video_with_sound(tokenizer, encode, tmp_path):
    frames = footage(5, height=16, width=24)
    path = write(tmp_path / "in.mp4", frames, audio=True)
    upright = media.read_frames(path)
    # The 3x3 matrix of the track header, 16.16 fixed point: a quarter turn clockwise.
    one, minus, last = (
        value.to_bytes(4, "big", signed=True) for value in (1 << 16, -(1 << 16), 1 << 30)
    )
    zero, data = bytes(4), path.read_bytes()
    identity = one + zero * 3 + one + zero * 3 + last
    turn = zero + one + zero + minus + zero * 4 + last
    at = data.index(identity, data.index(b"tkhd"))
    path.write_bytes(data[:at] + turn + data[at + len(turn) :])
    results, tokens, notes = encode(path)
    assert notes.startswith(f"note: {path}: its sound is left out\n")
    assert (results["width"], results["height"]) == (16, 24)
    assert_codes(tokens, tokenizer.encode(np.rot90(upright, -1, axes=(1, 2)), tokens=3))


def test_uneven_frame_times_and_a_single_frame(tokenizer, encode, decode, tmp_path):
    frames = footage(6)
    times = [0, 40, 80, 600, 640, 1000]
    path = write(tmp_path / "uneven.mkv", frames, times=times)
    _, tokens, notes = encode(path)
    assert "its frame rate varies; every frame is kept" in notes
    assert_codes(tokens, tokenizer.encode(frames, tokens=3))
    _, tokens, notes = encode(write(tmp_path / "one.mkv", frames[:1]))
    assert (tokens.frames, notes) == (1, "")
    assert tokens.fps > 0
    assert media.probe(decode("one.mp4")).frames == 1
    assert Image.open(decode("one.png")).size == (16, 16)


# ---- goals and options


def test_budgets_resolution_and_limits(encode, tmp_path):
    path = write(tmp_path / "in.mkv", footage(12, height=32, width=48))
    results, tokens, _ = encode(path, "--resolution", "16", goal=("--budget", "0.5"))
    assert (results["width"], results["height"], results["blocks"]) == (24, 16, 6)
    assert tokens.num_tokens == 6 * 4
    results, tokens, _ = encode(
        path, "--resolution", "16", "--max-frames", "6", goal=("--total-tokens", "9")
    )
    assert (tokens.num_tokens, results["frames"]) == (9, 6)
    results, tokens, _ = encode(
        path, "--max-frames", "5", "--window-blocks", "1", "--compress", goal=("--tokens", "8")
    )
    assert (tokens.window_blocks, results["frames"], results["tokens"]) == (1, 5, 2 * 6 * 8)
    assert results["bits"] == pytest.approx(2 * 6 * 8 * np.log2(64_000))


def test_what_is_missed_is_said(model, tmp_path, capsys):
    path = write(tmp_path / "in.mkv", footage(8))
    for goal, words in [
        ("MSE 1e-09", ["--max-mse", "1e-9", "--search", "binary"]),
        ("PSNR 90 dB", ["--min-psnr", "90"]),
    ]:
        words += ["-o", tmp_path / "clip.etok", "--model", model]
        assert cli.main(["encode", *map(str, [path, *words])]) == 0
        printed = capsys.readouterr().out
        assert f"2 of 2 blocks miss {goal}" in printed
        assert "8 frames, 2 blocks, 16 tokens (8.0 of 8 a block), 255 bits nominal" in printed


def test_help_names_every_search(capsys):
    with pytest.raises(SystemExit):
        cli.main(["encode", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name in SEARCHES:
        assert name in text


# ---- pipes


def test_raw_frames_from_a_real_pipe(tokenizer, model, tmp_path):
    frames = footage(6, height=17, width=31)
    words = ["encode", "-", "-o", tmp_path / "clip.etok", "--model", model, "--json"]
    words += ["--size", "31x17", "--fps", "12.5", "--budget", "0.5"]
    done = subprocess.run(
        [sys.executable, "-m", "elastictok_jax", *map(str, words)],
        input=frames.tobytes(),
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["frames"] == 6
    tokens = Tokens.load(tmp_path / "clip.etok")
    assert (tokens.height, tokens.width, tokens.fps) == (17, 31, 12.5)
    assert tokens.num_tokens <= 0.5 * 8 * len(tokens.codes)
    assert_codes(tokens, tokenizer.encode(frames, tokens=tokens.lengths))


@pytest.fixture
def piped(monkeypatch):
    """Puts bytes into a real pipe that is standard input."""
    threads, files = [], []

    def pipe(data):
        end, start = os.pipe()

        def send():
            with contextlib.suppress(BrokenPipeError), open(start, "wb") as stream:
                stream.write(data)

        threads.append(threading.Thread(target=send))
        threads[-1].start()
        files.append(open(end))  # noqa: SIM115
        monkeypatch.setattr(sys, "stdin", files[-1])

    yield pipe
    for file in files:
        file.close()
    for thread in threads:
        thread.join()


def y4m(frames, *, pix_fmt, rate=10):
    file = io.BytesIO()
    with av.open(file, "w", format="yuv4mpegpipe") as container:
        stream = container.add_stream("wrapped_avframe", rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format=pix_fmt)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv422p", "yuv444p", "gray"])
def test_y4m_is_read_as_ffmpeg_reads_it(pix_fmt, tmp_path):
    data = y4m(footage(3, height=17, width=31), pix_fmt=pix_fmt)
    (tmp_path / "clip.y4m.mkv").write_bytes(data)  # ffmpeg goes by the content
    expected = media.read_frames(tmp_path / "clip.y4m.mkv")
    stream = io.BytesIO(data)
    header = raw_video.read_y4m_header(stream)
    assert (header.width, header.height, header.fps) == (31, 17, 10.0)
    np.testing.assert_array_equal(list(raw_video.read_y4m(stream, header)), expected)


def test_y4m_from_a_pipe(tokenizer, encode, piped):
    data = y4m(footage(5), pix_fmt="yuv444p")
    piped(data)
    results, tokens, _ = encode("-", "--max-frames", "5")
    stream = io.BytesIO(data)
    frames = list(raw_video.read_y4m(stream, raw_video.read_y4m_header(stream)))
    assert_codes(tokens, tokenizer.encode(np.stack(frames), tokens=3))
    assert (results["fps"], results["frames"]) == (10.0, 5)


def test_a_pipe_that_is_cut_off_keeps_whole_frames(tokenizer, refused, piped, tmp_path):
    frames = footage(6)
    piped(frames.tobytes()[:-100])
    words = ("encode", "-", "-o", tmp_path / "clip.etok", "--tokens", 3)
    line = refused(*words, "--size", "16x16", "--fps", 10, status=1)
    assert "standard input ended within frame 5: 668 of 768 bytes: the 5 frames before are" in line
    assert_codes(Tokens.load(tmp_path / "clip.etok"), tokenizer.encode(frames[:5], tokens=3))
    data = y4m(frames, pix_fmt="yuv444p")
    piped(data.replace(b"FRAME", b"GAMES", 4).replace(b"GAMES", b"FRAME", 3))
    assert "ended within frame 3: b'GAMES\\n" in refused(*words, status=1)
    assert Tokens.load(tmp_path / "clip.etok").frames == 3


def test_numbered_pictures_of_a_longer_clip_do_not_stay(model, encode, decode, tmp_path):
    for count in (6, 3):
        encode(write(tmp_path / "in.mkv", footage(count)))
        decode("frame-%02d.png")
    kept = tmp_path / "frame-10.png"  # not of that clip: numbers between are missing
    kept.touch()
    decode("frame-%02d.png")
    names = sorted(path.name for path in tmp_path.glob("frame-*"))
    assert names == ["frame-00.png", "frame-01.png", "frame-02.png", kept.name]


def test_an_interrupted_stream_keeps_its_blocks(tokenizer):
    frames = footage(8)

    def until_ctrl_c():
        yield from frames[:6]
        raise KeyboardInterrupt

    camera = FrameStream("camera", until_ctrl_c(), 16, 16, fps=10.0, num_frames=None)
    tokens = _encode_in_order(tokenizer, camera, Goal(tokens=3))
    assert camera.fault == "camera was interrupted"
    assert_codes(tokens, tokenizer.encode(frames[:4], tokens=3))


def test_more_than_a_file_may_hold_is_kept_so_far(tokenizer, refused, tmp_path, monkeypatch):
    frames = footage(14)
    path = write(tmp_path / "in.mkv", frames)
    monkeypatch.setattr(etok, "MAX_TOKENS", 8)
    line = refused("encode", path, "-o", tmp_path / "clip.etok", "--tokens", 3, status=1)
    assert "is more than one .etok file may hold: the 8 frames before are in" in line
    assert_codes(Tokens.load(tmp_path / "clip.etok"), tokenizer.encode(frames[:8], tokens=3))
    line = refused("encode", path, "-o", tmp_path / "other.etok", "--total-tokens", 9)
    assert "is more than one .etok file may hold: cut it" in line  # before the work
    assert not (tmp_path / "other.etok").exists()


@pytest.mark.parametrize(
    ("data", "words", "message"),
    [
        (b"\x00" * 800, [], "of raw rgb24 frames give --size WIDTHxHEIGHT and --fps"),
        (b"\x00" * 800, ["--size", "16x16"], "does not give its frame rate: add --fps"),
        (b"\x00" * 800, ["--size", "16", "--fps", "3"], "--size 16: write WIDTHxHEIGHT"),
        (b"\x00" * 800, ["--size", "16x0", "--fps", "3"], "frames of 16x0"),
        (b"\x00" * 800, ["--size", "99999x99999", "--fps", "3"], "99999x99999: give 1 to"),
        (b"\x00" * 800, ["--size", "16x16", "--fps", "0"], "--fps 0: give"),
        (b"\x00" * 80, ["--size", "16x16", "--fps", "3"], "frame 0: 80 of 768 bytes"),
        (b"", ["--size", "16x16", "--fps", "3"], "has no frames"),
        (b"YUV4MPEG2 W16", [], "damaged y4m header"),
        (b"YUV4MPEG2 W16 H16 F" + b"9" * 400 + b":1 C420", [], "damaged y4m header"),
        (b"YUV4MPEG2 W16 H16 F100000000000000000000:1 C420", [], "say how many by --fps"),
        (b"YUV4MPEG2 W16 H16 F10:1 C420p10\n", [], "y4m of C420p10: send one of C420,"),
        (b"YUV4MPEG2 W16 H16 F0:0\n", [], "add --fps"),
        (b"YUV4MPEG2 W16 H16 F1:1\n" * 99, ["--size", "16x16", "--fps", "3"], "leave out --size"),
    ],
)
def test_pipes_that_cannot_be_read(refused, piped, tmp_path, *, data, words, message):
    piped(data)
    line = refused("encode", "-", "-o", tmp_path / "clip.etok", "--tokens", 3, *words)
    assert message in line
    assert list(tmp_path.iterdir()) == []


# ---- what is refused


def test_bad_files_and_options_are_named(refused, tmp_path):
    (tmp_path / "in.mp4").write_bytes(b"no video")
    (tmp_path / "folder.etok").mkdir()
    image = tmp_path / "in.png"
    media.write_image(image, footage(1)[0])
    encode = ("-o", tmp_path / "clip.etok", "--tokens", 3)
    for words, message in [
        ((tmp_path / "no.mp4", *encode), "no.mp4: no such file"),
        ((tmp_path / "in.mp4", *encode), "in.mp4: not a video"),
        ((tmp_path, *encode), "unknown suffix"),
        ((image, "-o", tmp_path / "clip.png", "--tokens", 3), "end in .etok"),
        ((image, "-o", tmp_path / "folder.etok", "--tokens", 3), "is a folder: name a file"),
        ((image, "-o", tmp_path / "no" / "a.etok", "--tokens", 3), "folder does not exist"),
        ((image, "-o", "/proc/a.etok", "--tokens", 3), "-o /proc/a.etok cannot be written"),
        ((image, *encode, "--size", "3x3"), "--size is for raw frames from a pipe"),
        ((image, *encode, "--fps", 4), "in.png is an image; leave it out"),
        ((image, *encode, "--resolution", 0), "--resolution 0: give at least 1"),
        ((image, *encode, "--max-frames", 0), "--max-frames 0: give at least 1"),
        ((image, *encode, "--window-blocks", 0), "--window-blocks 0: give at least 1 and"),
        ((image, *encode, "--search", "magic"), "search 'magic': choose one of hybrid"),
        ((image, *encode[:-1], 9), "whole numbers from 1 to 8"),
        ((image, *encode[:-2], "--budget", 2), "a fraction of all tokens"),
        (("-", *encode[:-2], "--total-tokens", 2), "for a pipe give --budget"),
    ]:
        assert message in refused("encode", *words)
        assert not (tmp_path / "clip.etok").exists()


def test_a_resolution_beyond_the_limit_is_refused_at_once(refused, tmp_path):
    media.write_image(tmp_path / "a.png", footage(1)[0])
    media.write_video(tmp_path / "a.mp4", footage(4), fps=10)
    for name in ("a.png", "a.mp4"):
        for verb, target in (("encode", "a.etok"), ("reconstruct", "out")):
            words = (verb, tmp_path / name, "-o", tmp_path / target, "--tokens", 3)
            line = refused(*words, "--resolution", 100_000)
            assert f"{name}: 16x16 scaled to 100000 pixels" in line
            assert "more than 67108864 pixels" in line


@pytest.mark.parametrize("fps", [4.0, 10.0, 7.3, 0.5])
def test_frames_of_a_file_are_taken_by_time_as_training_takes_them(encode, fps):
    path = EMBEDDED / "heldout" / "bbb_kite.mp4"
    results, tokens, _ = encode(path, "--fps", str(fps))
    source = FileSource(path)
    settings = default_source_config(path=str(path), fps=fps)
    config = default_config()
    apply_overrides(config, SMALL)
    feeds = (SourceSplit("main", 0, source, settings, np.arange(1)),)
    trained = ClipReader(feeds, config, split="heldout").read_frames(
        PackedClip(0, 0, 0, 0, 1), most=99
    )
    footage = open_frame_stream(str(path), side=16, fps=fps)
    taken = media.center_crop(np.stack(list(footage.frames)), height=16, width=16)
    np.testing.assert_array_equal(taken, trained)
    seconds = source.frames[0] / source.fps[0]
    assert results["frames"] == tokens.frames == len(taken) == int(np.ceil(seconds * fps - 1e-9))
    assert tokens.fps == fps


def test_a_file_of_fewer_frames_than_asked_for_is_kept_as_it_is(encode, tmp_path):
    media.write_video(tmp_path / "a.mp4", footage(5), fps=10)
    results, tokens, said = encode(tmp_path / "a.mp4", "--fps", "24")
    assert (results["frames"], tokens.fps) == (5, 10.0)
    assert "it has 10 frames a second, fewer than --fps 24" in said


def test_frames_at_uneven_times_are_taken_by_time(tmp_path):
    path, shades = str(tmp_path / "uneven.mkv"), [0, 50, 100, 150, 200, 250]
    with av.open(path, "w") as container:
        stream = container.add_stream("ffv1", rate=1000)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "bgr0"
        for shade, milliseconds in zip(shades, [0, 100, 200, 1000, 2200, 2300], strict=True):
            picture = np.full((16, 16, 3), shade, np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = milliseconds, Fraction(1, 1000)
            container.mux(stream.encode(frame.reformat(format="bgr0")))
        container.mux(stream.encode())
    footage = open_frame_stream(path, fps=2.0)
    seen = [int(frame[0, 0, 0]) for frame in footage.frames]
    assert (seen, footage.fps, footage.notes) == ([0, 100, 150, 150, 200, 250], 2.0, [])
    assert len(list(open_frame_stream(path).frames)) == 6


def test_what_is_lost_of_an_animation_is_said(encode, tmp_path):
    pictures = [Image.fromarray(frame) for frame in footage(3)]
    path = tmp_path / "a.gif"  # its content counts
    pictures[0].save(path, "WEBP", save_all=True, append_images=pictures[1:])
    results, _, said = encode(path)
    assert results["frames"] == 1
    assert f"note: {path} is an animation: only the first of its 3 frames is read" in said


def test_a_missing_coder_is_said_before_the_work(refused, piped, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "constriction", None)
    piped(b"")  # no frame is asked for
    words = ("--size", "16x16", "--fps", 1, "--tokens", 1, "--compress")
    line = refused("encode", "-", "-o", tmp_path / "clip.etok", *words)
    assert "pip install 'elastictok_jax[compress]'" in line


def test_one_goal_is_needed(model, tmp_path, capsys):
    for goals in ([], ["--tokens", "3", "--max-mse", "0.1"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(["encode", "a.png", "-o", "a.etok", "--model", str(model), *goals])
        assert stop.value.code == 2
        assert "--max-mse" in capsys.readouterr().err


def test_outputs_that_do_not_fit_the_tokens(tokenizer, refused, tmp_path):
    video, image = tmp_path / "video.etok", tmp_path / "image.etok"
    tokenizer.encode(footage(3), tokens=2, fps=5.0).save(video)
    tokenizer.encode(footage(1)[0], tokens=2).save(image)
    (tmp_path / "bad.etok").write_bytes(b"some words that are no tokens")
    other = tokenizer.encode(footage(1), tokens=2)
    object.__setattr__(other, "fingerprint", "0" * 16)
    other.save(tmp_path / "other.etok")
    for words, message in [
        ((video, "-o", tmp_path / "a.png"), "3 frames; write an .mp4, or as many pictures with -o"),
        ((image, "-o", tmp_path / "a.mp4"), "the tokens are of an image; write a .png"),
        ((video, "-o", tmp_path / "a.txt"), "unknown suffix '.txt'"),
        ((video, "-o", tmp_path / "a%s.png"), "like frame-%05d.png"),
        ((video, "-o", tmp_path / "a%d.mp4"), "only pictures are numbered"),
        ((tmp_path / "no.etok", "-o", tmp_path / "a.mp4"), "no.etok does not exist"),
        ((tmp_path / "bad.etok", "-o", tmp_path / "a.mp4"), "bad.etok is damaged"),
        ((tmp_path / "other.etok", "-o", tmp_path / "a.png"), "with the model that encoded them"),
    ]:
        assert message in refused("decode", *words)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".etok"] * 4
