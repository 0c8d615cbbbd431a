"""Reads and writes images and videos as uint8 RGB arrays.

Dimensions: T frames, H height, W width, C = 3 (red, green, blue). Only the modules of this folder
import av. Pixels are read as stored: a pixel aspect ratio other than 1 is not resampled.
"""

from elastictok_jax.data.media.color import yuv_to_rgb
from elastictok_jax.data.media.file_kinds import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    file_kind,
    media_kind,
)
from elastictok_jax.data.media.files import LIMITS, MediaError, MediaLimits
from elastictok_jax.data.media.geometry import (
    LONGEST,
    center_crop,
    crop_long_strip,
    resize_shortest,
    scaled_size,
)
from elastictok_jax.data.media.images import (
    WRITABLE_IMAGES,
    decode_image,
    opened_image,
    read_image,
    write_image,
)
from elastictok_jax.data.media.probing import MediaInfo, probe, probe_media_loss
from elastictok_jax.data.media.recompression import COMPARED_CODECS, Recompressed, recompress
from elastictok_jax.data.media.stored_video import StoredVideo
from elastictok_jax.data.media.video_reader import VideoReader, read_frames
from elastictok_jax.data.media.video_writer import encode_video_bytes, write_video
from elastictok_jax.errors import UsageError

__all__ = [
    "COMPARED_CODECS",
    "IMAGE_SUFFIXES",
    "LIMITS",
    "LONGEST",
    "VIDEO_SUFFIXES",
    "WRITABLE_IMAGES",
    "MediaError",
    "MediaInfo",
    "MediaLimits",
    "Recompressed",
    "StoredVideo",
    "UsageError",
    "VideoReader",
    "center_crop",
    "crop_long_strip",
    "decode_image",
    "encode_video_bytes",
    "file_kind",
    "media_kind",
    "opened_image",
    "probe",
    "probe_media_loss",
    "read_frames",
    "read_image",
    "recompress",
    "resize_shortest",
    "scaled_size",
    "write_image",
    "write_video",
    "yuv_to_rgb",
]
