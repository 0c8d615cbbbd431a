"""Video files as found in the wild: out of order, untimed, mirrored, damaged, without video."""

import functools
import io
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from elastictok_jax.data import media
from elastictok_jax.data.frame_rate import frame_rate_fault
from elastictok_jax.data.frame_stream import open_frame_stream
from elastictok_jax.data.media.containers import container_fault
from tests.mutations.inputs import (
    CONTAINERS,
    DAMAGES,
    TURNS,
    footage,
    generator,
    stamped_numbers,
    write_container,
    write_turned_video,
)

ENTRIES = {entry[0]: entry for entry in CONTAINERS}
FRAMES = 24


def write(path, *, pts=None, rate=Fraction(25)):
    write_container(path, ENTRIES[path.name], footage()[:FRAMES], rate=rate, pts=pts)
    return path


UNTIMED = ["b.avi", "pyramid.avi", "asp_b.avi", "mjpeg.avi"]


@pytest.mark.parametrize("name", [*UNTIMED, "mpeg1.mpg", "x264.flv", "mpeg2.ts", "asp.mkv"])
def test_frames_stored_out_of_order_are_read_in_order(name, tmp_path):
    path = write(tmp_path / name)
    with media.VideoReader(path) as reader:
        assert stamped_numbers(reader.read(0, FRAMES)) == list(range(FRAMES))
        for index in (20, 3, 11):
            assert stamped_numbers(reader.read(index, 1)) == [index]
        assert reader.fps == 25
        assert reader.evenly_spaced


@pytest.mark.parametrize("codec", ["libx264", "mpeg1video", "mpeg4"])
def test_a_stream_without_a_container_is_read(codec, tmp_path):
    """Raw streams have no times at all, so their rate cannot vary."""
    suffix = {"libx264": "h264", "mpeg1video": "mpeg1video", "mpeg4": "m4v"}[codec]
    entry = ("", suffix, codec, "yuv420p", {"bf": "2"}, {})
    raw = tmp_path / "raw"
    write_container(raw, entry, footage()[:FRAMES], rate=Fraction(25))
    path = tmp_path / "raw.mpg"
    raw.rename(path)
    with media.VideoReader(path) as reader:
        assert stamped_numbers(reader.read(0, FRAMES)) == list(range(FRAMES))
        assert reader.evenly_spaced
    assert not [note for note in open_frame_stream(str(path)).notes if "varies" in note]


@pytest.mark.parametrize("name", ["x264.mkv", "vp8.webm", "x264.mp4", "x264.flv", "live.webm"])
def test_the_mean_rate_is_that_of_the_timestamps(name, tmp_path):
    pts = np.concatenate([np.arange(12) * 33, 12 * 33 + np.arange(12) * 2000])
    path = write(tmp_path / name, pts=pts, rate=Fraction(30))
    with media.VideoReader(path) as reader:
        assert reader.fps == pytest.approx(1000 * (FRAMES - 1) / pts[-1], rel=1e-3)
        assert not reader.evenly_spaced
    (note,) = open_frame_stream(str(path)).notes
    assert f"varies; every frame is kept, at the mean of {reader.fps:.6g} a" in note


@pytest.mark.parametrize("turn", TURNS)
def test_a_video_is_shown_by_its_whole_display_matrix(turn, tmp_path):
    shown = footage()[:3]
    stored = np.stack([np.ascontiguousarray(TURNS[turn](frame)) for frame in shown])
    path = tmp_path / "turned.mp4"
    write_turned_video(path, turn=turn, frames=stored)
    frames = media.read_frames(path)
    assert stamped_numbers(frames) == [0, 1, 2]
    assert np.abs(frames.astype(int) - shown).mean() < 4


DAMAGED = ["x264.mkv", "vp9.webm", "x264.flv", "vp8.ogv", "wmv2.wmv", "b.avi", "live.webm"]


@functools.cache
def sound_bytes(folder, name):
    return write(folder / name).read_bytes()


@pytest.mark.parametrize("name", DAMAGED)
def test_a_hole_in_the_middle_is_noticed(name, tmp_path):
    path = tmp_path / name
    sound = sound_bytes(tmp_path, name)
    assert container_fault(path) == ""
    for damage in ("zeros", "noise", "cut_out"):
        path.write_bytes(DAMAGES[damage](bytearray(sound), generator(name + damage)))
        with pytest.raises(media.MediaError, match=r"damaged|truncated|not all"):
            media.read_frames(path)


@pytest.mark.parametrize("name", ["x264.mp4", "b.avi", "mpeg2.ts"])
def test_what_a_decoder_would_conceal_is_damage(name, tmp_path):
    path = write(tmp_path / name)
    data = bytearray(path.read_bytes())
    start = len(data) * 3 // 5
    data[start : start + 3000] = generator(name).bytes(3000)
    path.write_bytes(data)
    with pytest.raises(media.MediaError, match=r"damaged|truncated|not all"):
        media.read_frames(path)


def write_song(path, *, film):
    """Writes a sound file with a cover picture and, maybe, a video."""
    cover = io.BytesIO()
    Image.new("RGB", (64, 64), "teal").save(cover, "JPEG")
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=44100)
        streams = [container.add_stream("mjpeg", rate=1)]
        streams[0].width = streams[0].height = 64
        streams[0].pix_fmt = "yuvj420p"
        streams[0].disposition = av.stream.Disposition.attached_pic
        if film:
            streams.append(container.add_stream("libx264", rate=25))
            streams[1].height, streams[1].width = footage().shape[1:3]
        packet = av.Packet(cover.getvalue())
        packet.stream, packet.pts, packet.dts, packet.is_keyframe = streams[0], 0, 0, True
        container.mux(packet)
        for start in range(0, 44100, 1024):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate, frame.pts = 44100, start
            container.mux(sound.encode(frame))
        for picture in footage()[:FRAMES] if film else ():
            container.mux(streams[1].encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        for stream in (sound, *streams[1:]):
            container.mux(stream.encode(None))


def test_a_cover_picture_is_no_film(tmp_path):
    write_song(tmp_path / "song.mp4", film=False)
    with pytest.raises(media.MediaError, match="only the cover picture of a sound file"):
        media.probe(tmp_path / "song.mp4")
    write_song(tmp_path / "film.mp4", film=True)
    assert stamped_numbers(media.read_frames(tmp_path / "film.mp4")) == list(range(FRAMES))


@pytest.mark.parametrize("fps", [1 / 86400, 1 / 3600, 0.01, 24000 / 1001, 12345.678, 1e5])
def test_a_rate_that_is_read_can_be_written(fps, tmp_path):
    path = tmp_path / "slow.mp4"
    media.write_video(path, footage()[:2], fps=fps)
    with media.VideoReader(path) as reader:
        assert reader.fps == pytest.approx(fps)
    assert "at most 1000" in frame_rate_fault("a.mkv", 5000)
    assert "from 1e-05" in frame_rate_fault("a.mp4", float("nan"))


def test_a_name_with_a_colon_is_no_protocol(tmp_path):
    path = tmp_path / "12:30.mp4"
    media.write_video(path, footage()[:2], fps=25)
    assert media.probe(path).frames == 2
