"""Describes and checks media files, images and videos alike."""

from dataclasses import dataclass

from elastictok_jax.data.media import color
from elastictok_jax.data.media.decoding import open_for_decoding
from elastictok_jax.data.media.file_kinds import file_kind
from elastictok_jax.data.media.files import LIMITS, MediaLimits
from elastictok_jax.data.media.images import opened_image, read_image
from elastictok_jax.data.media.video_reader import VideoReader


@dataclass(frozen=True)
class MediaInfo:
    """Contents of a media file.

    Attributes:
      kind: 'image' or 'video'; fps: frames a second, 0 for an image.
      height, width: in pixels, as shown.
    """

    path: str
    kind: str
    frames: int
    fps: float
    height: int
    width: int


def probe(path, *, limits: MediaLimits = LIMITS) -> MediaInfo:
    """Describes and checks the file at `path` without decoding all of a video.

    A video is demuxed, its size on disk is compared with its index, and its first and last
    frames are decoded. Raises MediaError for a file that is missing, empty, not media,
    truncated, without frames or beyond `limits`.
    """
    if file_kind(path) == "image":
        height, width, _ = read_image(path, limits=limits).shape
        return MediaInfo(str(path), "image", 1, 0.0, height, width)
    with VideoReader(path, limits=limits) as reader:
        reader.read(reader.frame_count - 1, 1)  # opening it decoded the first
        return MediaInfo(
            str(path), "video", reader.frame_count, reader.fps, reader.height, reader.width
        )


def probe_media_loss(path) -> str:
    """Returns what reading a sound file loses, as text to follow its name; "" for nothing.

    That is color beyond a usual screen's, and all but the first frame of an animated image.
    Raises MediaError for a file that cannot be opened.
    """
    if file_kind(path) == "image":
        with opened_image(path, name=path) as image:
            frames = getattr(image, "n_frames", 1)
            moves = frames > 1 and image.format in ("PNG", "WEBP", "AVIF")
            return (
                f"is an animation: only the first of its {frames} frames is read" if moves else ""
            )
    container, stream = open_for_decoding(str(path), threads=1)
    with container:
        return color.hdr_color_note(stream)
