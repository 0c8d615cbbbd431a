"""Reads and writes images as uint8 RGB arrays [H, W, 3]."""

import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin
from simplejpeg import decode_jpeg, decode_jpeg_header

from elastictok_jax.data.media.file_kinds import (
    IMAGE_BRANDS,
    file_head,
    image_format,
    is_video_head,
)
from elastictok_jax.data.media.files import (
    LIMITS,
    MediaError,
    MediaLimits,
    require_media_file,
    require_parent_folder,
)
from elastictok_jax.data.media.geometry import require_rgb_frames, require_sane_size
from elastictok_jax.errors import UsageError
from elastictok_jax.storage.atomic import replacing

WRITABLE_IMAGES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
_XMP = b"http://ns.adobe.com/xap/"


# What Pillow warns about, MediaError reports or is harmless.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


def read_image(path, *, limits: MediaLimits = LIMITS) -> np.ndarray:
    """Reads the image at `path`: uint8 [H, W, 3].

    The EXIF orientation is applied, grey and palette become RGB, 16 bits become 8, transparency
    is composited over white, and an animation gives its first frame. Raises MediaError for a file
    that is missing, empty, not an image, truncated, or of more than `limits.pixels` pixels.
    """
    require_media_file(path)
    return _decode_image(path, name=path, limits=limits)


def decode_image(data: bytes, *, name: str, limits: MediaLimits = LIMITS) -> np.ndarray:
    """Decodes an image in memory as `read_image` does; errors call it `name`."""
    pixels = _decode_plain_jpeg(data, limits=limits)
    return _decode_image(io.BytesIO(data), name=name, limits=limits) if pixels is None else pixels


def _decode_plain_jpeg(data: bytes, *, limits: MediaLimits) -> np.ndarray | None:
    """Decodes a sound, upright JPEG in two thirds of Pillow's time; None for any other file."""
    if not data.startswith(b"\xff\xd8") or b"Exif\0" in data or _XMP in data:
        return None  # EXIF and XMP may hold an orientation
    try:
        height, width, colors, _ = decode_jpeg_header(data)
        if colors not in ("YCbCr", "Gray") or height * width > limits.pixels:
            return None
        return decode_jpeg(data, strict=True)
    except ValueError:
        return None  # Pillow reports the error


def _decode_image(file, *, name, limits: MediaLimits) -> np.ndarray:
    try:
        with opened_image(file, name=name) as image:
            # Before any pixel is decoded.
            require_sane_size(name, image.height, image.width, limits=limits)
            if image.mode == "F":
                raise MediaError(
                    f"{name}: its pixels are floats of unknown range; save it in 8 bits"
                )
            return np.asarray(_to_rgb(ImageOps.exif_transpose(image)))
    except UsageError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise MediaError(f"{name}: damaged image ({error}); save it again or delete it") from error


@contextmanager
def opened_image(file, *, name) -> Iterator[Image.Image]:
    """Opens a path or file with Pillow, whose own limits are lifted meanwhile.

    Raises MediaError, naming it `name`, if it is not an image that can be read.
    """
    with _PILLOW_LIMITS.lifted():
        try:
            image = Image.open(file)
        except Image.UnidentifiedImageError as error:
            head = file.getvalue()[:400] if isinstance(file, io.BytesIO) else file_head(file)
            form = image_format(head)
            if form in IMAGE_BRANDS.values():
                raise MediaError(
                    f"{name}: {form} is not supported; convert it to PNG or JPEG"
                ) from error
            if is_video_head(head):
                raise MediaError(f"{name}: a video; an image is needed here") from error
            damaged = f"a damaged {form}" if form else "not an image, whatever its suffix"
            raise MediaError(f"{name}: {damaged}; delete it") from error
        with image:
            yield image


class _PillowLimits:
    """Lifts Pillow's own limits while one of our images is open: `MediaLimits` replaces them.

    They are global constants, above which Pillow warns, refuses an image that we accept, or
    reports one as damaged because of the text that it carries.
    """

    TEXT_BYTES = 2**26

    def __init__(self) -> None:
        self._lock, self._open = threading.Lock(), 0
        self._before: tuple = ()

    @contextmanager
    def lifted(self) -> Iterator[None]:
        with self._lock:
            if self._open == 0:
                self._before = (
                    Image.MAX_IMAGE_PIXELS,
                    PngImagePlugin.MAX_TEXT_CHUNK,
                    PngImagePlugin.MAX_TEXT_MEMORY,
                )
                self._set(None, self.TEXT_BYTES, self.TEXT_BYTES)
            self._open += 1
        try:
            yield
        finally:
            with self._lock:
                self._open -= 1
                if self._open == 0:
                    self._set(*self._before)

    def _set(self, pixels: int | None, chunk: int, memory: int) -> None:
        Image.MAX_IMAGE_PIXELS = pixels
        PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = chunk, memory


_PILLOW_LIMITS = _PillowLimits()


def write_image(path, image_HWC, *, quality: int = 95) -> None:
    """Writes uint8 [H, W, 3] atomically in the format of the suffix.

    `quality` is for jpg and webp. Raises UsageError for another shape, type or suffix.
    """
    image_HWC = require_rgb_frames(image_HWC, dims=3)
    if Path(path).suffix.lower() not in WRITABLE_IMAGES:
        raise UsageError(f"{path}: use one of {' '.join(sorted(WRITABLE_IMAGES))}")
    require_parent_folder(path)
    with replacing(Path(path)) as temporary:
        Image.fromarray(image_HWC).save(temporary, quality=quality)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        grey = np.asarray(image).astype(np.int64) >> 8  # Pillow would clip 16 bits, not scale
        return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
