"""Converts one original to records: resizes images and re-encodes video in parts."""

import dataclasses
import hashlib
import io
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from elastictok_jax.data import media
from elastictok_jax.data.prepare.scenes import SceneCuts
from elastictok_jax.data.sources.tfds_records import FRAME_RATE, PART_FRAMES, RecordSource

JPEG_QUALITY = 95
FRAMES_AT_ONCE = 32
LOSSLESS = frozenset({"PNG", "BMP", "GIF"})
ORIENTATION = 0x0112  # EXIF tag


@dataclasses.dataclass(frozen=True)
class TranscodeSettings:
    """Options that the content of a prepared data set depends on, beside its inputs.

    Attributes:
      resolution: most pixels of the shortest side, 0 for no bound; crf: x264's quality, lower is
        better; scene_cuts: whether videos are split at scene cuts; limits: of originals.
    """

    resolution: int
    crf: int
    scene_cuts: bool
    limits: media.MediaLimits


def transcode_file(
    path: Path, *, name: str, settings: TranscodeSettings
) -> tuple[list[dict[str, Any]], str]:
    """Converts an image or video file to records with the fields of `tfds_records.features`.

    Returns the records, and what is lost beside the size, "" for nothing.

    Raises:
      MediaError: saying what is wrong with the file.
    """
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise media.MediaError(f"{path}: cannot be read ({error.strerror or error})") from error
    origin = {"source": name, "content_hash": digest}
    if media.file_kind(path) == "image":
        pixels = media.read_image(path, limits=settings.limits)
        record = origin | _transcode_image(path.read_bytes(), pixels, settings=settings)
        return [record], media.probe_media_loss(path)
    with media.VideoReader(path, limits=settings.limits) as reader:
        if reader.frame_count == 1:  # a still GIF
            made = [_transcode_image(None, reader.read(0, 1)[0], settings=settings)]
        else:
            fps = reader.fps or FRAME_RATE
            frames = _video_frames(reader, resolution=settings.resolution)
            made = list(_transcode_video(frames, fps=fps, settings=settings))
    return [origin | record for record in made], media.probe_media_loss(path)


def transcode_item(source: RecordSource, item: int, *, name: str, settings: TranscodeSettings):
    """Converts an item of another data set to its records, and ""; see `transcode_file`."""
    origin = {"source": name, "content_hash": ""}
    if not source.is_video[item]:
        data = source.encoded_image(item)
        pixels = media.decode_image(data, name=name, limits=settings.limits)
        origin["content_hash"] = hashlib.sha256(data).hexdigest()
        return [origin | _transcode_image(data, pixels, settings=settings)], ""
    seen = hashlib.sha256()
    total = int(source.frames[item])

    def frames() -> Iterator[np.ndarray]:
        for start in range(0, total, FRAMES_AT_ONCE):
            indices = np.arange(start, min(start + FRAMES_AT_ONCE, total))
            for frame in source.read_at_most(item, indices, side=settings.resolution):
                seen.update(frame.tobytes())
                yield frame

    made = list(_transcode_video(frames(), fps=float(source.fps[item]), settings=settings))
    origin["content_hash"] = seen.hexdigest()
    return [origin | record for record in made], ""


def _transcode_image(
    data: bytes | None, pixels: np.ndarray, *, settings: TranscodeSettings
) -> dict[str, Any]:
    """Makes the record of an image uint8 [H, W, 3]; keeps its own bytes `data` if possible."""
    side = min(pixels.shape[:2])
    wanted = min(side, settings.resolution or side)
    plain, form = _plain_form(data)
    if not (plain and wanted == side):
        pixels = media.resize_shortest(pixels[None], side=wanted)[0]
        file = io.BytesIO()
        if form in LOSSLESS:
            Image.fromarray(pixels).save(file, "PNG")
        else:
            Image.fromarray(pixels).save(file, "JPEG", quality=JPEG_QUALITY)
        data = file.getvalue()
    height, width, _ = pixels.shape
    size = {"height": height, "width": width, "frames": 1, "fps": 0.0, "duration": 0.0}
    return {"kind": "image", "data": data, "start": 0, "part": 0} | size


def _plain_form(data: bytes | None) -> tuple[bool, str]:
    """Returns whether a file can be stored as it is (upright RGB JPEG or PNG), and its format."""
    if data is None:
        return False, "GIF"
    with media.opened_image(io.BytesIO(data), name="an original") as image:
        upright = image.getexif().get(ORIENTATION, 1) == 1
        plain = upright and image.mode == "RGB" and not image.has_transparency_data
        return plain and image.format in ("JPEG", "PNG"), image.format or ""


def _transcode_video(
    frames: Iterable[np.ndarray], *, fps: float, settings: TranscodeSettings
) -> Iterator[dict[str, Any]]:
    """Yields records of at most PART_FRAMES frames, in one pass over frames uint8 [H, W, 3]."""
    cuts = SceneCuts() if settings.scene_cuts else None

    def by_record() -> Iterator[tuple[tuple[int, int], int, np.ndarray]]:
        """Yields each frame's (stretch, part), its number and its pixels."""
        stretch, first = 0, 0
        for number, frame in enumerate(frames):
            if cuts and cuts.is_cut(frame):
                stretch, first = stretch + 1, number
            yield (stretch, (number - first) // PART_FRAMES), number, frame

    for (_, part), group in itertools.groupby(by_record(), key=lambda entry: entry[0]):
        yield _video_record(
            ((n, frame) for _, n, frame in group), part=part, fps=fps, settings=settings
        )


def _video_record(
    numbered: Iterator[tuple[int, np.ndarray]],
    *,
    part: int,
    fps: float,
    settings: TranscodeSettings,
) -> dict[str, Any]:
    seen: list[tuple[int, ...]] = []  # number, height and width of each frame

    def pixels() -> Iterator[np.ndarray]:
        for number, frame in numbered:
            seen.append((number, *frame.shape[:2]))
            yield frame

    data = media.encode_video_bytes(pixels(), fps=fps, crf=settings.crf)
    start, height, width = seen[0]
    size = {"height": height, "width": width, "frames": len(seen), "fps": fps}
    span = {"start": start, "part": part, "duration": len(seen) / fps}
    return {"kind": "video", "data": data} | size | span


def _video_frames(reader: media.VideoReader, *, resolution: int) -> Iterator[np.ndarray]:
    side = min(reader.height, reader.width)
    wanted = min(side, resolution or side)
    for start in range(0, reader.frame_count, FRAMES_AT_ONCE):
        count = min(FRAMES_AT_ONCE, reader.frame_count - start)
        yield from reader.read(start, count, side=wanted)
