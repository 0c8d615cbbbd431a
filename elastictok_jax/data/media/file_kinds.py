"""Tells images from videos by what a file begins with, or by its suffix."""

from pathlib import Path

from elastictok_jax.data.media.files import MediaError

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif"}
    | {".heic", ".heif"}
)
VIDEO_SUFFIXES = frozenset(
    {".gif", ".mp4", ".m4v", ".mp4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".vob"}
    | {".ts", ".mts", ".m2ts", ".flv", ".wmv", ".asf", ".3gp", ".3g2", ".ogv"}
)
_IMAGE_MAGIC: dict[str, bytes | tuple[bytes, ...]] = {
    "JPEG": b"\xff\xd8\xff",
    "PNG": b"\x89PNG\r\n\x1a\n",
    "TIFF": (b"II*\0", b"MM\0*"),
}
IMAGE_BRANDS = {
    **dict.fromkeys((b"avif", b"avis"), "AVIF"),
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1"), "HEIC"),
}
_VIDEO_MAGIC = (
    *(b"\x1a\x45\xdf\xa3", b"FLV", b"OggS", b"\x30\x26\xb2\x75\x8e\x66\xcf\x11"),
    *(b"\0\0\1\xba", b"\0\0\1\xb3", b"YUV4MPEG2 "),  # MPEG, y4m
)


def media_kind(path) -> str:
    """Returns 'image' or 'video' by the suffix of `path`; MediaError for any other suffix."""
    suffix = Path(path).suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return "image"
    if suffix in VIDEO_SUFFIXES:
        return "video"
    known = " ".join(sorted(IMAGE_SUFFIXES | VIDEO_SUFFIXES))
    raise MediaError(f"{path}: unknown suffix {suffix!r}; use one of {known}")


def file_kind(path) -> str:
    """Returns 'image' or 'video' by the file's content, or by its suffix if that is unknown.

    A GIF is a video, even with a single frame.
    """
    head = file_head(path)
    if head.startswith(b"GIF8") or is_video_head(head):
        return "video"
    return "image" if image_format(head) else media_kind(path)


def file_head(path) -> bytes:
    """Returns the first bytes of a file, b"" if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(400)
    except OSError:
        return b""  # opening it reports the error


def image_format(head: bytes) -> str:
    """Returns the name of the image format by a file's first bytes, else ''."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WebP"
    if head[4:8] == b"ftyp":
        return IMAGE_BRANDS.get(head[8:12], "")
    if head[:2] == b"BM":  # a text may begin so too
        return "BMP" if head[6:10] == bytes(4) else ""
    return next((name for name, magic in _IMAGE_MAGIC.items() if head.startswith(magic)), "")


def is_video_head(head: bytes) -> bool:
    """Returns whether a file's first bytes are those of a video container."""
    if head[4:8] == b"ftyp":
        return head[8:12] not in IMAGE_BRANDS
    if head[:4] == b"RIFF":
        return head[8:12] == b"AVI "
    if head[4:8] in (b"moov", b"mdat", b"wide"):  # QuickTime from before ftyp
        return True
    is_transport_stream = head[:1] == b"G" and head[188:189] == b"G" and head[376:377] == b"G"
    return is_transport_stream or head.startswith(_VIDEO_MAGIC)
