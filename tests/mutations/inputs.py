"""Mutations of the embedded footage: other containers, damage, odd names, torn files.

Everything is a function of its name, so that a failure can be made again by name alone:

    python tests/mutations/inputs.py FOLDER [NAME ...]

writes them (a minute for all). Frames are stamped with their number, so that a reader which returns
another frame than the one asked for is found out even where neighbouring frames look alike.
"""

import dataclasses
import functools
import hashlib
import os
import struct
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from elastictok_jax.data import media

FOOTAGE = Path(media.__file__).parents[1] / "embedded" / "heldout"
FRAMES = 40
CELL = 16  # pixels of one digit of the stamp
DIGITS = 8
SOUND, DAMAGED = "sound", "damaged"


@dataclasses.dataclass(frozen=True)
class Input:
    """One file to read.

    Attributes:
      name: file name, unique.
      write: makes the file at a path.
      state: SOUND must be read, and exactly; DAMAGED must be refused, or read exactly.
      truth: frames uint8 [T, H, W, 3] that the file holds.
      fps: frames a second it holds; None where the container has no way to say.
      psnr: decibels that each frame has to `truth` at least.
    """

    name: str
    write: Callable[[Path], None]
    state: str
    truth: np.ndarray
    fps: float | None = None
    psnr: float = 24.0


def generator(name: str) -> np.random.Generator:
    """Random numbers that depend on `name` alone."""
    return np.random.default_rng(list(hashlib.sha256(name.encode()).digest()))


@functools.cache
def footage(clip: str = "city_busy.mp4", frames: int = FRAMES) -> np.ndarray:
    """Stamped frames uint8 [T, 144, 256, 3] of an embedded clip."""
    video = media.read_frames(FOOTAGE / clip, start=0, count=frames).copy()
    for number, frame in enumerate(video):
        for digit in range(DIGITS):
            frame[:CELL, digit * CELL : (digit + 1) * CELL] = 235 * (number >> digit & 1) + 10
    video.flags.writeable = False
    return video


def stamped_numbers(frames: np.ndarray) -> list[int]:
    """The number that each frame [H, W, 3] is stamped with."""
    middle = CELL // 2
    columns = np.arange(DIGITS) * CELL + middle
    bits = frames[:, middle, columns].mean(axis=-1) > 128
    return [int(sum(1 << digit for digit in np.flatnonzero(row))) for row in bits]


# ---- containers

# name, container, codec, pixel format, options of the codec, options of the container
CONTAINERS = [
    ("b.avi", "avi", "libx264", "yuv420p", {"bf": "3"}, {}),
    ("pyramid.avi", "avi", "libx264", "yuv420p", {"bf": "3", "b-pyramid": "strict"}, {}),
    ("zerolatency.avi", "avi", "libx264", "yuv420p", {"tune": "zerolatency"}, {}),
    ("asp_b.avi", "avi", "mpeg4", "yuv420p", {"bf": "2"}, {}),
    ("asp.avi", "avi", "mpeg4", "yuv420p", {}, {}),
    ("mjpeg.avi", "avi", "mjpeg", "yuvj420p", {"qmin": "1", "qmax": "2"}, {}),
    ("ffv1.avi", "avi", "ffv1", "yuv444p", {}, {}),
    ("raw.avi", "avi", "rawvideo", "yuv420p", {}, {}),
    ("x264.mkv", "matroska", "libx264", "yuv420p", {"bf": "3"}, {}),
    ("live.mkv", "matroska", "libx264", "yuv420p", {"bf": "2"}, {"live": "1"}),
    ("x265.mkv", "matroska", "libx265", "yuv420p", {"x265-params": "log-level=none"}, {}),
    ("asp.mkv", "matroska", "mpeg4", "yuv420p", {"bf": "2"}, {}),
    ("ffv1.mkv", "matroska", "ffv1", "bgr0", {}, {}),
    ("clusters.mkv", "matroska", "libx264", "yuv420p", {"bf": "2"}, {"cluster_time_limit": "100"}),
    ("vp8.webm", "webm", "libvpx", "yuv420p", {"b": "2M", "auto-alt-ref": "1"}, {}),
    ("vp9.webm", "webm", "libvpx-vp9", "yuv420p", {"b": "2M", "cpu-used": "8"}, {}),
    ("live.webm", "webm", "libvpx", "yuv420p", {"b": "2M"}, {"live": "1"}),
    ("x264.mp4", "mp4", "libx264", "yuv420p", {"bf": "3"}, {}),
    ("open_gop.mp4", "mp4", "libx264", "yuv420p", {"bf": "3", "x264-params": "open-gop=1"}, {}),
    ("faststart.mp4", "mp4", "libx264", "yuv420p", {}, {"movflags": "faststart"}),
    ("fragments.mp4", "mp4", "libx264", "yuv420p", {}, {"movflags": "frag_keyframe+empty_moov"}),
    ("x264_444.mp4", "mp4", "libx264", "yuv444p", {}, {}),
    ("x264_422.mp4", "mp4", "libx264", "yuv422p", {}, {}),
    ("ten_bit.mp4", "mp4", "libx264", "yuv420p10le", {}, {}),
    ("asp.mp4", "mp4", "mpeg4", "yuv420p", {"bf": "2"}, {}),
    ("mjpeg.mov", "mov", "mjpeg", "yuvj422p", {"qmin": "1", "qmax": "2"}, {}),
    ("prores.mov", "mov", "prores_ks", "yuv422p10le", {}, {}),
    ("x264.mov", "mov", "libx264", "yuv420p", {"bf": "2"}, {}),
    ("x264.ts", "mpegts", "libx264", "yuv420p", {"bf": "2"}, {}),
    ("mpeg2.ts", "mpegts", "mpeg2video", "yuv420p", {"bf": "2"}, {}),
    ("x264.m2ts", "mpegts", "libx264", "yuv420p", {"bf": "2"}, {"mpegts_m2ts_mode": "1"}),
    ("mpeg1.mpg", "mpeg", "mpeg1video", "yuv420p", {"bf": "2"}, {}),
    ("mpeg2.mpg", "vob", "mpeg2video", "yuv420p", {"bf": "2"}, {}),
    ("flv1.flv", "flv", "flv", "yuv420p", {}, {}),
    ("x264.flv", "flv", "libx264", "yuv420p", {"bf": "2"}, {}),
    ("vp8.ogv", "ogg", "libvpx", "yuv420p", {"b": "2M"}, {}),
    ("wmv2.wmv", "asf", "wmv2", "yuv420p", {}, {}),
    ("asp.3gp", "3gp", "mpeg4", "yuv420p", {}, {}),
    ("x264.m4v", "mp4", "libx264", "yuv420p", {}, {}),
]


def write_container(path: Path, entry, frames: np.ndarray, *, rate: Fraction, pts=None) -> None:
    """Writes frames [T, H, W, 3] as one of CONTAINERS; `pts` are in units of 1 / 1000 s."""
    _, form, codec, pixel_format, codec_options, options = entry
    quality = {"libx264": {"crf": "12"}, "libx265": {"crf": "12"}, "mpeg4": {"qmax": "2"}}
    quality |= {name: {"qmax": "3"} for name in ("flv", "wmv2", "mpeg1video", "mpeg2video")}
    with av.open(str(path), "w", format=form, options=options) as container:
        stream = container.add_stream(
            codec, rate=rate, options=quality.get(codec, {}) | codec_options
        )
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixel_format
        stream.codec_context.gop_size = 10
        if pts is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        elif codec == "libx264" and "bf" not in codec_options:
            stream.codec_context.max_b_frames = 0
        for number, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            if pts is not None:
                picture.pts, picture.time_base = int(pts[number]), Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def containers() -> Iterator[Input]:
    """Sound files of every container, with and without frames stored out of their order."""
    for entry in CONTAINERS:
        rate = Fraction(25) if entry[2].startswith("mpeg") else Fraction(30000, 1001)
        write = functools.partial(write_container, entry=entry, frames=footage(), rate=rate)
        yield Input(entry[0], write, SOUND, footage(), fps=float(rate))


def varying_rates() -> Iterator[Input]:
    """Clips whose frames are not evenly spaced: the rate is their mean."""
    entries = {entry[0]: entry for entry in CONTAINERS}
    for base in ("x264.mkv", "vp8.webm", "x264.mp4", "x264.mov", "asp.mkv", "live.webm"):
        for gap in (90, 900):
            name = f"gap{gap}_{base}"
            gaps = generator(name).integers(33, gap, size=FRAMES - 1)
            pts = np.concatenate([[0], np.cumsum(gaps)])
            write = functools.partial(
                write_container, entry=entries[base], frames=footage(), rate=Fraction(30), pts=pts
            )
            fps = 1000 * (FRAMES - 1) / float(pts[-1])
            yield Input(name, write, SOUND, footage(), fps=fps)


# ---- damage


def zeros(data: bytearray, rng: np.random.Generator) -> bytes:
    """A run of bytes lost on a disk or a download in pieces."""
    size = int(rng.integers(len(data) // 40, len(data) // 8))
    start = int(rng.integers(len(data) // 4, len(data) - size))
    data[start : start + size] = bytes(size)
    return bytes(data)


def noise(data: bytearray, rng: np.random.Generator) -> bytes:
    size = int(rng.integers(len(data) // 40, len(data) // 8))
    start = int(rng.integers(len(data) // 4, len(data) - size))
    data[start : start + size] = rng.bytes(size)
    return bytes(data)


def cut_out(data: bytearray, rng: np.random.Generator) -> bytes:
    size = int(rng.integers(len(data) // 40, len(data) // 8))
    start = int(rng.integers(len(data) // 4, len(data) - size))
    del data[start : start + size]
    return bytes(data)


def cut_off(data: bytearray, rng: np.random.Generator) -> bytes:
    return bytes(data[: int(rng.integers(len(data) // 8, len(data) * 7 // 8))])


DAMAGES = {"zeros": zeros, "noise": noise, "cut_out": cut_out, "cut_off": cut_off}


def write_damaged(path: Path, *, sound: Input, damage: str) -> None:
    whole = path.with_name("whole-" + path.name)
    sound.write(whole)
    data = bytearray(whole.read_bytes())
    whole.unlink()
    path.write_bytes(DAMAGES[damage](data, generator(path.name)))


def damaged_videos() -> Iterator[Input]:
    bases = ("x264.mkv", "vp8.webm", "vp9.webm", "x264.mp4", "fragments.mp4", "b.avi", "asp.avi")
    bases += ("x264.ts", "mpeg2.mpg", "x264.flv", "vp8.ogv", "wmv2.wmv", "ffv1.mkv", "mjpeg.mov")
    sound = {entry.name: entry for entry in containers()}
    for base in bases:
        for damage in DAMAGES:
            write = functools.partial(write_damaged, sound=sound[base], damage=damage)
            yield Input(f"{damage}_{base}", write, DAMAGED, footage())


# ---- pictures


@functools.cache
def photo(name: str = "photo_chelsea.jpg") -> np.ndarray:
    """A picture uint8 [H, W, 3], larger in width than in height."""
    image = media.read_image(FOOTAGE / name)[:120, :160].copy()
    image[:24, :24] = (250, 20, 20)  # no two of its eight turns look alike
    image.flags.writeable = False
    return image


TURNS = {  # EXIF orientation: how the stored picture is made of the shown one
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: x.swapaxes(0, 1)[::-1],
    7: lambda x: x.swapaxes(0, 1)[::-1, ::-1],
    8: lambda x: x.swapaxes(0, 1)[:, ::-1],
}
# A display matrix (a, b, c, d) takes a stored pixel (x, y) to (a x + c y, b x + d y).
MATRICES = {
    1: (1, 0, 0, 1),
    2: (-1, 0, 0, 1),
    3: (-1, 0, 0, -1),
    4: (1, 0, 0, -1),
    5: (0, 1, 1, 0),
    6: (0, 1, -1, 0),
    7: (0, -1, -1, 0),
    8: (0, -1, 1, 0),
}


def write_picture(path: Path, *, form: str, image: np.ndarray, orientation: int = 1) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 97} if form in ("JPEG", "WEBP", "AVIF") else {}
    if orientation != 1:
        options["exif"] = exif.tobytes()
    Image.fromarray(image).save(path, form, **options)


def turned_pictures() -> Iterator[Input]:
    for form, suffix in (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")):
        for turn, turned in TURNS.items():
            stored = np.ascontiguousarray(turned(photo()))
            write = functools.partial(write_picture, form=form, image=stored, orientation=turn)
            yield Input(f"turn{turn}.{suffix}", write, SOUND, photo()[None], psnr=28)


def write_turned_video(path: Path, *, turn: int, frames: np.ndarray) -> None:
    write_container(path, CONTAINERS[17], frames, rate=Fraction(25))
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 4 + 20 + 16  # version 0: times and ids, then layer and volume
    a, b, c, d = MATRICES[turn]
    one = 1 << 16
    struct.pack_into(">9i", data, at, a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def turned_videos() -> Iterator[Input]:
    shown = footage()
    for turn, turned in TURNS.items():
        stored = np.stack([np.ascontiguousarray(turned(frame)) for frame in shown])
        write = functools.partial(write_turned_video, turn=turn, frames=stored)
        yield Input(f"turn{turn}.mp4", write, SOUND, shown, fps=25.0)


def misnamed_pictures() -> Iterator[Input]:
    """The content decides what a file is, not its suffix."""
    forms = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
    for form in forms:
        for suffix in ("png", "jpg", "gif", "webp"):
            if suffix[:2] != form.lower()[:2]:
                truth = photo()[None]
                write = functools.partial(write_picture, form=form, image=photo())
                psnr = 20 if form == "GIF" else 28  # a palette
                yield Input(f"{form.lower()}_as.{suffix}", write, SOUND, truth, psnr=psnr)


def write_damaged_picture(path: Path, *, form: str, damage: str) -> None:
    write_picture(path, form=form, image=photo())
    path.write_bytes(DAMAGES[damage](bytearray(path.read_bytes()), generator(path.name)))


def damaged_pictures() -> Iterator[Input]:
    for form, suffix in (("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp"), ("TIFF", "tif")):
        for damage in ("cut_off", "zeros", "noise", "cut_out"):
            if damage != "cut_off" and form != "PNG":
                continue  # no checksum: what is wrong cannot be known
            write = functools.partial(write_damaged_picture, form=form, damage=damage)
            yield Input(f"{damage}.{suffix}", write, DAMAGED, photo()[None])


KINDS: dict[str, Callable[[], Iterator[Input]]] = {
    "containers": containers,
    "varying_rates": varying_rates,
    "damaged_videos": damaged_videos,
    "turned_pictures": turned_pictures,
    "turned_videos": turned_videos,
    "misnamed_pictures": misnamed_pictures,
    "damaged_pictures": damaged_pictures,
}


def main(arguments: list[str]) -> None:
    folder, names = Path(arguments[0]), set(arguments[1:])
    for kind, inputs in KINDS.items():
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for entry in inputs():
            if not names or entry.name in names:
                entry.write(folder / kind / entry.name)
                print(os.path.join(folder, kind, entry.name))


if __name__ == "__main__":
    main(sys.argv[1:])
