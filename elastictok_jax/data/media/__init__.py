"""Images and videos as uint8 RGB arrays, and back.

Dimensions: T frames, H height, W width, C = 3 (red, green, blue). Only this file and `color`
import av. Reading a video at random gives exactly what decoding it in order gives: frames are
found by presentation timestamp, never by frame rate, and each frame that a seek returns is
checked against the timestamps of the whole file. Pixels are taken as they are stored: no
resampling for a pixel aspect ratio other than 1.
"""

import io
import os
import threading
import uuid
import warnings
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.bitstream import BitStreamFilterContext
from av.sidedata.sidedata import Type as SideDataType
from av.stream import Disposition
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image, ImageOps, PngImagePlugin
from simplejpeg import decode_jpeg, decode_jpeg_header

from elastictok_jax.data.frame_rate import frames_read, recorded_at, step_between
from elastictok_jax.data.media import color, containers
from elastictok_jax.errors import RunError, UsageError

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif"}
    | {".heic", ".heif"}
)
WRITABLE_IMAGES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
VIDEO_SUFFIXES = frozenset(
    {".gif", ".mp4", ".m4v", ".mp4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".vob"}
    | {".ts", ".mts", ".m2ts", ".flv", ".wmv", ".asf", ".3gp", ".3g2", ".ogv"}
)
# One packet is one shown frame and keyframes can be trusted: the others are read in order.
_SEEKABLE_CODECS = frozenset(
    {"h264", "hevc", "vp9", "av1", "mpeg1video", "mpeg2video", "mpeg4", "ffv1", "mjpeg"}
)
# Containers without times of presentation, which libav then guesses: frames are counted.
_UNTIMED = frozenset({"avi", "h264", "hevc", "m4v", "mpegvideo", "obu"})
_INTRA_CODECS = frozenset({"ffv1", "mjpeg", "rawvideo"})
# Their data has no long run of zeros: H.264 and HEVC forbid three, the others would waste bits.
_WITHOUT_ZEROS = frozenset({"h264", "hevc", "vp8", "vp9", "av1"})
_HOLE = bytes(64)  # as of a download in pieces, or of a bad sector
_NO_FILM = Disposition.attached_pic | Disposition.timed_thumbnails
_WRITE_FORMATS = {"libx264": "yuv420p", "libx264rgb": "rgb24", "ffv1": "bgr0"}
_CHROMA = {"4:2:0": "yuv420p", "4:4:4": "yuv444p"}
_WRITE_SUFFIXES = frozenset({".mp4", ".mkv", ".mov", ".m4v"})
_IMAGE_MAGIC: dict[str, bytes | tuple[bytes, ...]] = {
    "JPEG": b"\xff\xd8\xff",
    "PNG": b"\x89PNG\r\n\x1a\n",
    "TIFF": (b"II*\0", b"MM\0*"),
}
_IMAGE_BRANDS = {
    **dict.fromkeys((b"avif", b"avis"), "AVIF"),
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1"), "HEIC"),
}
_VIDEO_MAGIC = (
    *(b"\x1a\x45\xdf\xa3", b"FLV", b"OggS", b"\x30\x26\xb2\x75\x8e\x66\xcf\x11"),
    *(b"\0\0\1\xba", b"\0\0\1\xb3", b"YUV4MPEG2 "),  # MPEG, y4m
)
_XMP = b"http://ns.adobe.com/xap/"
_KEYFRAMES_TO_TRY = 4
_WORTH_A_SEEK = 32  # frames not asked for between two that are


# What Pillow has to say of a file is said by MediaError, or is nothing to worry about.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


class MediaError(UsageError):
    """A media file is missing, damaged or unsuitable; names the file, the fault and the mend."""


@dataclass(frozen=True)
class MediaInfo:
    """What a media file holds: kind 'image' or 'video', fps in frames a second (0 for an image),
    height and width in pixels as shown."""

    path: str
    kind: str
    frames: int
    fps: float
    height: int
    width: int


@dataclass(frozen=True)
class MediaLimits:
    """What is more than this is taken for a decompression bomb, and refused before it is decoded.

    Attributes:
      pixels: of one frame, as stored and as scaled; frames, seconds: of one video.
    """

    pixels: int = 2**26
    frames: int = 2**21
    seconds: float = 24 * 3600.0


LIMITS = MediaLimits()
SLOWEST, FASTEST = 1e-5, 100_000  # frames a second that can be written
LONGEST = 16  # times the short side: what lies beyond the middle of a longer strip is not scaled up


def media_kind(path) -> str:
    """'image' or 'video' by the suffix of `path`; MediaError for any other suffix."""
    suffix = Path(path).suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return "image"
    if suffix in VIDEO_SUFFIXES:
        return "video"
    known = " ".join(sorted(IMAGE_SUFFIXES | VIDEO_SUFFIXES))
    raise MediaError(f"{path}: unknown suffix {suffix!r}; use one of {known}")


def file_kind(path) -> str:
    """'image' or 'video' by what is in the file, or by its suffix where that is neither.

    A GIF is a video, also one of a single frame.
    """
    head = _head(path)
    if head.startswith(b"GIF8") or _video_format(head):
        return "video"
    return "image" if _image_format(head) else media_kind(path)


def _head(path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(400)
    except OSError:
        return b""  # what is wrong is said when it is opened


def _image_format(head: bytes) -> str:
    """The name of the image format that a file begins as, else ''."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WebP"
    if head[4:8] == b"ftyp":
        return _IMAGE_BRANDS.get(head[8:12], "")
    if head[:2] == b"BM":  # a text may begin so, too
        return "BMP" if head[6:10] == bytes(4) else ""
    return next((name for name, magic in _IMAGE_MAGIC.items() if head.startswith(magic)), "")


def _video_format(head: bytes) -> bool:
    """Whether a file begins as a video container does."""
    if head[4:8] == b"ftyp":
        return head[8:12] not in _IMAGE_BRANDS
    if head[:4] == b"RIFF":
        return head[8:12] == b"AVI "
    if head[4:8] in (b"moov", b"mdat", b"wide"):  # QuickTime of before ftyp
        return True
    is_transport_stream = head[:1] == b"G" and head[188:189] == b"G" and head[376:377] == b"G"
    return is_transport_stream or head.startswith(_VIDEO_MAGIC)


def loss_on_reading(path) -> str:
    """What of a sound file is lost when it is read, in words that follow its name; "" for nothing.

    That is color beyond that of a usual screen, and all but the first frame of a picture that
    moves. Raises MediaError for a file that cannot be opened.
    """
    if file_kind(path) == "image":
        with opened_image(path, name=path) as image:
            frames = getattr(image, "n_frames", 1)
            moves = frames > 1 and image.format in ("PNG", "WEBP", "AVIF")
            return (
                f"is an animation: only the first of its {frames} frames is read" if moves else ""
            )
    container, stream = _open_video(str(path), threads=1)
    with container:
        return color.brightness_note(stream)


def probe(path, *, limits: MediaLimits = LIMITS) -> MediaInfo:
    """Says what the file at `path` holds, and checks it without decoding a video whole.

    A video is demuxed, its size on disk is compared with what its index asks for, and its first
    and last frames are decoded. Raises MediaError for a file that is missing, empty, not media,
    truncated, without frames or beyond `limits`.
    """
    if file_kind(path) == "image":
        height, width, _ = read_image(path, limits=limits).shape
        return MediaInfo(str(path), "image", 1, 0.0, height, width)
    with VideoReader(path, limits=limits) as reader:
        reader.read(reader.frame_count - 1, 1)  # opening it has decoded the first
        return MediaInfo(
            str(path), "video", reader.frame_count, reader.fps, reader.height, reader.width
        )


def read_frames(
    path, *, start: int = 0, count: int | None = None, side: int | None = None
) -> np.ndarray:
    """Frames start .. start + count - 1 of a video, or an image as one frame: uint8 [T, H, W, 3].

    `count` None reads to the end; `side` resizes as `resize_shortest` does. Raises MediaError as
    `probe` does, and for frames out of range.
    """
    if file_kind(path) == "image":
        if start != 0 or count not in (None, 1):
            raise MediaError(f"{path}: an image has one frame; ask for start 0 and count 1")
        image = read_image(path)[None]
        return image if side is None else resize_shortest(image, side=side, name=path)
    with VideoReader(path) as reader:
        count = reader.frame_count - start if count is None else count
        return reader.read(start, count, side=side)


# ---- images


def read_image(path, *, limits: MediaLimits = LIMITS) -> np.ndarray:
    """The picture at `path`: uint8 [H, W, 3].

    Turned as its EXIF orientation says, grey and palette widened to RGB, 16 bits reduced to 8,
    transparency laid over white; of an animation, the first frame. Raises MediaError for a file
    that is missing, empty, not an image, truncated, or of more than `limits.pixels` pixels.
    """
    _require_file(path)
    return _decode_image(path, name=path, limits=limits)


def decode_image(data: bytes, *, name: str, limits: MediaLimits = LIMITS) -> np.ndarray:
    """`read_image` of an encoded picture in memory; `name` is what errors call it."""
    pixels = _decode_plain_jpeg(data, limits=limits)
    return _decode_image(io.BytesIO(data), name=name, limits=limits) if pixels is None else pixels


def _decode_plain_jpeg(data: bytes, *, limits: MediaLimits) -> np.ndarray | None:
    """A sound JPEG that nothing has to be done to, in two thirds of Pillow's time; else None."""
    if not data.startswith(b"\xff\xd8") or b"Exif\0" in data or _XMP in data:
        return None  # EXIF and XMP may say that it is turned
    try:
        height, width, colors, _ = decode_jpeg_header(data)
        if colors not in ("YCbCr", "Gray") or height * width > limits.pixels:
            return None
        return decode_jpeg(data, strict=True)
    except ValueError:
        return None  # Pillow says what is wrong with it


def _decode_image(file, *, name, limits: MediaLimits) -> np.ndarray:
    try:
        with opened_image(file, name=name) as image:
            # Before any pixel is decoded.
            _require_sane_size(name, image.height, image.width, limits=limits)
            if image.mode == "F":
                raise MediaError(f"{name}: of real numbers in an unknown range; save it in 8 bits")
            return np.asarray(_to_rgb(ImageOps.exif_transpose(image)))
    except UsageError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise MediaError(f"{name}: damaged image ({error}); save it again or delete it") from error


@contextmanager
def opened_image(file, *, name) -> Iterator[Image.Image]:
    """Pillow's image of a path or file, within which its own limits do not hold.

    Raises MediaError, calling it `name`, where it is not an image that can be read.
    """
    with _PILLOW_LIMITS.lifted():
        try:
            image = Image.open(file)
        except Image.UnidentifiedImageError as error:
            head = file.getvalue()[:400] if isinstance(file, io.BytesIO) else _head(file)
            form = _image_format(head)
            if form in _IMAGE_BRANDS.values():
                raise MediaError(f"{name}: {form} is not read here; make it PNG or JPEG") from error
            if _video_format(head):
                raise MediaError(f"{name}: a video; an image is needed here") from error
            damaged = f"a damaged {form}" if form else "not an image, whatever its suffix"
            raise MediaError(f"{name}: {damaged}; delete it") from error
        with image:
            yield image


class _PillowLimits:
    """Lifts Pillow's own bounds, which `MediaLimits` replaces while one of our images is open.

    They are fixed numbers for the process, at which Pillow prints a warning, refuses a picture that
    we are to read, or calls one damaged for the text that it carries.
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
    """Writes uint8 [H, W, 3] in the format of the suffix; `quality` is for jpg and webp.

    The file appears whole or not at all. Raises UsageError for another shape, type or suffix.
    """
    image_HWC = _require_rgb(image_HWC, dims=3)
    if Path(path).suffix.lower() not in WRITABLE_IMAGES:
        raise UsageError(f"{path}: use one of {' '.join(sorted(WRITABLE_IMAGES))}")
    with _written_whole(path) as temporary:
        Image.fromarray(image_HWC).save(temporary, quality=quality)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        grey = np.asarray(image).astype(np.int64) >> 8  # Pillow would clip 16 bits, not scale
        return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


# ---- geometry


def resize_shortest(frames_THWC, *, side: int, name="frames") -> np.ndarray:
    """Frames uint8 [T, H, W, 3] scaled so that the shorter of H and W is `side` pixels.

    Antialiased (Lanczos), the aspect kept to the nearest pixel; the same array where nothing
    changes. Raises UsageError for another shape or type, for side < 1 and, calling them `name`,
    where they would be larger than LIMITS.
    """
    frames_THWC = _require_rgb(frames_THWC, dims=4)
    if side < 1:
        raise UsageError(f"side is {side}; it must be at least 1 pixel")
    count, height, width, _ = frames_THWC.shape
    new_height, new_width = scaled_size(height, width, side=side, name=name)
    if (new_height, new_width) == (height, width):
        return frames_THWC
    resized = np.empty((count, new_height, new_width, 3), np.uint8)
    for frame, out in zip(frames_THWC, resized, strict=True):
        out[:] = _resize(frame, height=new_height, width=new_width)
    return resized


def scaled_size(height: int, width: int, *, side: int, name="frames") -> tuple[int, int]:
    """Height and width in pixels after `resize_shortest`.

    Raises MediaError, calling it `name`, where that is more than LIMITS.
    """
    short = min(height, width)
    if short == side:
        return height, width
    high, wide = max(side, round(height * side / short)), max(side, round(width * side / short))
    if side > short and high * wide > LIMITS.pixels:
        raise MediaError(
            f"{name}: {width}x{height} scaled to {side} pixels on its shortest side is "
            f"{wide}x{high}, more than {LIMITS.pixels} pixels; choose a smaller resolution or crop "
            "it"
        )
    return high, wide


def middle(frames_THWC, *, longest: int = LONGEST) -> np.ndarray:
    """Frames uint8 [T, H, W, 3] without the ends that make one side more than `longest` times as
    long as the other, as a view: to be scaled up at a bounded cost and then cropped."""
    height, width = _middle_size(*frames_THWC.shape[1:3], longest=longest)
    return center_crop(frames_THWC, height=height, width=width)


def _middle_size(height: int, width: int, *, longest: int) -> tuple[int, int]:
    return min(height, longest * width), min(width, longest * height)


def _resize(frame_HWC: np.ndarray, *, height: int, width: int) -> np.ndarray:
    if frame_HWC.shape[:2] == (height, width):
        return frame_HWC
    resized = Image.fromarray(np.ascontiguousarray(frame_HWC))
    return np.asarray(resized.resize((width, height), Image.Resampling.LANCZOS))


def center_crop(frames_THWC, *, height: int, width: int) -> np.ndarray:
    """The middle [T, height, width, 3] of frames uint8 [T, H, W, 3], as a view.

    Raises UsageError where the frames are smaller than that.
    """
    frames_THWC = _require_rgb(frames_THWC, dims=4)
    _, old_height, old_width, _ = frames_THWC.shape
    if not (0 < height <= old_height and 0 < width <= old_width):
        raise UsageError(
            f"cannot crop {height}x{width} out of {old_height}x{old_width}; resize first"
        )
    top, left = (old_height - height) // 2, (old_width - width) // 2
    return frames_THWC[:, top : top + height, left : left + width]


# ---- reading video


class VideoReader:
    """Exact random access to the frames of one video file.

        with VideoReader("clip.mp4") as reader:
            frames = reader.read(reader.frame_count - 8, 8)  # uint8 [8, H, W, 3]

    Opening demuxes the file once and decodes its first frame; MediaError says what is wrong with
    it. Reading on from where the last read ended costs no seek. `threads` is the number of
    decoding threads, 0 for one a core. Not for use from several Python threads at once.
    """

    def __init__(self, path, *, threads: int = 1, limits: MediaLimits = LIMITS):
        self.path = str(path)
        self._threads = threads
        self._index = _index_video(self.path, threads=threads, limits=limits)
        self._decoding: _Decoding | None = None
        self._was_counted = False

    frame_count = property(lambda self: len(self._index.pts), doc="Frames in the file.")
    fps = property(lambda self: self._index.fps, doc="Mean frame rate, frames a second.")
    height = property(lambda self: self._index.height, doc="Pixels, as shown.")
    width = property(lambda self: self._index.width, doc="Pixels, as shown.")
    has_audio = property(lambda self: self._index.has_audio, doc="Whether the file has sound.")
    evenly_spaced = property(lambda self: self._index.is_even, doc="Whether fps is constant.")

    def indices_at(self, fps: float) -> np.ndarray:
        """int64, ascending: the frames nearest to 0, 1 / fps, 2 / fps, ... seconds, until the video
        ends. Every frame, once, where `fps` is not below the video's own."""
        step = float(step_between(self.fps, fps))
        numbers = np.arange(int(frames_read(self.frame_count, step)))
        if self.evenly_spaced or step == 1:
            return recorded_at(numbers, step=step, frames=self.frame_count)
        times = np.asarray(self._index.times, np.float64) - self._index.times[0]
        times *= (self.frame_count - 1) / times[-1]  # in frames at the mean rate
        return np.searchsorted((times[1:] + times[:-1]) / 2, numbers * step, side="right")

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; a later read opens it again."""
        if self._decoding is not None:
            self._decoding.container.close()
            self._decoding = None

    def read(self, start: int, count: int, *, side: int | None = None) -> np.ndarray:
        """Frames start .. start + count - 1: uint8 [count, H, W, 3]; see `read_at`."""
        if start < 0 or count < 0 or start + count > self.frame_count:
            raise MediaError(
                f"{self.path}: frames {start} to {start + count - 1} asked for, "
                f"but it has 0 to {self.frame_count - 1}"
            )
        return self.read_at(range(start, start + count), side=side)

    def read_at(
        self, indices: Iterable[int], *, side: int | None = None, longest: int | None = None
    ) -> np.ndarray:
        """Frames at ascending `indices`: uint8 [T, H, W, 3]; `longest` crops as `middle`, and then
        `side` resizes as `resize_shortest`.

        One frame at a time is held at full size. Raises MediaError for frames out of range, for
        frames that cannot be decoded and for those that `side` makes larger than LIMITS.
        """
        wanted = [int(index) for index in indices]
        height, width = self.height, self.width
        if longest is not None:
            height, width = _middle_size(height, width, longest=longest)
        crop = (height, width)
        if side is not None:
            height, width = scaled_size(height, width, side=side, name=self.path)
        out = np.empty((len(wanted), height, width, 3), np.uint8)
        if wanted and (wanted[0] < 0 or wanted[-1] >= self.frame_count):
            raise MediaError(
                f"{self.path}: frames {wanted[0]} to {wanted[-1]} asked for, "
                f"but it has 0 to {self.frame_count - 1}"
            )
        first = 0
        for last in range(1, len(wanted) + 1):
            if last == len(wanted) or wanted[last] - wanted[last - 1] > _WORTH_A_SEEK:
                self._read_run(wanted[first:last], crop=crop, out=out[first:last])
                first = last
        return out

    def _read_run(self, wanted: list[int], *, crop: tuple[int, int], out: np.ndarray) -> None:
        """Fills `out` with the frames at `wanted`, which are close together."""
        if self._try_run(wanted, crop=crop, out=out):
            return
        # The container's timestamps may be wrong: count frames instead, but look only once.
        if self._index.keyframes and not self._was_counted:
            self._was_counted = True
            counted = _times_when_decoded(self.path, threads=self._threads)
            if len(counted) == self.frame_count:
                self._index = replace(self._index, pts=tuple(range(len(counted))), keyframes=())
                if self._try_run(wanted, crop=crop, out=out):
                    return
        raise MediaError(
            f"{self.path}: damaged: of frames {wanted[0]} to {wanted[-1]} not all can be "
            "decoded; re-encode or delete it"
        )

    def _try_run(self, wanted: list[int], *, crop: tuple[int, int], out: np.ndarray) -> bool:
        for decoding in self._ways_to(wanted[0]):
            self._decoding = decoding
            try:
                done = _take(
                    decoding, self._index, path=self.path, wanted=wanted, crop=crop, out=out
                )
            except BaseException:
                self.close()  # how many frames it has given is unknown now
                raise
            if done:
                return True
        self.close()
        return False

    def _ways_to(self, start: int) -> Iterator["_Decoding"]:
        """Decoders that should come to frame `start`, the quickest first, the surest last."""
        keyframes = self._index.keyframes
        nearest = bisect_right(keyframes, self._index.pts[start]) if keyframes else 0
        if self._decoding is not None and self._decoding.position <= start:
            gap_has_keyframe = nearest > 0 and (
                keyframes[nearest - 1] > self._index.pts[self._decoding.position]
            )
            if not gap_has_keyframe:
                yield self._decoding
        # A seek may overshoot where decoding order is not presentation order: step back then.
        for key in range(nearest - 1, max(0, nearest - 1 - _KEYFRAMES_TO_TRY), -1):
            self.close()
            yield _start_decoding(self.path, threads=self._threads, seek_to=keyframes[key])
        self.close()
        yield _start_decoding(self.path, threads=self._threads)


@dataclass(frozen=True)
class _VideoIndex:
    """Timestamps of the frames in presentation order, and of those where decoding can start, in
    the stream's time base. Without keyframes the timestamps are just 0, 1, 2, ... and frames can
    only be counted off from the start.

    times are when frames are shown, in ticks of any length. fps is the number of frames but one
    over the time from the first to the last."""

    pts: tuple[int, ...]
    times: tuple[int, ...]
    keyframes: tuple[int, ...]
    fps: float
    is_even: bool
    height: int
    width: int
    has_audio: bool


@dataclass
class _Decoding:
    """A file being decoded. position: the frame that comes next, once a read has succeeded.
    anchored: a keyframe has come by, so what follows has all the frames that it refers to."""

    container: av.container.InputContainer
    frames: Iterator[av.VideoFrame]
    position: int
    anchored: bool
    to_rgb: "_ToRgb"


def _take(
    decoding, index, *, path, wanted: list[int], crop: tuple[int, int], out: np.ndarray
) -> bool:
    """Fills `out` with the frames at `wanted`; False where the decoder does not deliver them."""
    filled, number = 0, None  # number: of the frame that comes next, once that is sure
    shape = (index.height, index.width, 3)
    same_size = out.shape[1:] == shape
    try:
        for frame in decoding.frames:
            if index.keyframes:
                if frame.pts is None:
                    return False
                decoding.anchored |= _contains(index.keyframes, frame.pts)
                if number is None:
                    if frame.pts < index.pts[wanted[0]]:
                        continue
                    number = wanted[0]
                if frame.pts != index.pts[number] or not decoding.anchored:
                    return False
            else:
                number = decoding.position if number is None else number
            if number == wanted[filled]:
                if frame.is_corrupt:
                    return False
                pixels = out[filled] if same_size else np.empty(shape, np.uint8)
                decoding.to_rgb(frame, pixels, path=path)
                if not same_size:
                    pixels = center_crop(pixels[None], height=crop[0], width=crop[1])[0]
                    out[filled] = _resize(pixels, height=out.shape[1], width=out.shape[2])
                filled += 1
            elif frame.is_corrupt and filled:
                return False  # what follows may refer to it
            number += 1
            decoding.position = number
            if filled == len(wanted):
                return True
    except av.FFmpegError:
        return False
    return False


def _contains(ascending: tuple[int, ...], value: int) -> bool:
    place = bisect_right(ascending, value)
    return place > 0 and ascending[place - 1] == value


def _start_decoding(path, *, threads: int, seek_to: int | None = None) -> _Decoding:
    container, stream = _open_video(path, threads=threads)
    if seek_to is not None:
        container.seek(seek_to, stream=stream, backward=True)
    to_rgb = _ToRgb(color.complete_siting(stream))
    # Of frames that turn out larger than the first; twice, as decoders round sizes up.
    most = 2 * max(LIMITS.pixels, stream.height * stream.width)
    options = {"max_pixels": str(most), "err_detect": "explode"}  # and nothing is concealed
    stream.codec_context.options = stream.codec_context.options | options
    frames = _without_damaged_head(container, stream)
    return _Decoding(container, frames, position=0, anchored=seek_to is None, to_rgb=to_rgb)


def _without_damaged_head(container, stream) -> Iterator[av.VideoFrame]:
    """All frames from the first sound one on; raises FFmpegError at damage after it."""
    # A recording cut out of a longer one may start with frames that refer to what was cut off.
    started = False
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except EOFError:
            return
        except av.FFmpegError:
            if started:
                raise
            continue
        for frame in frames:
            started = started or not frame.is_corrupt
            if started:
                yield frame


class _ToRgb:
    """Frames as they are shown. Not for use from several threads at once."""

    def __init__(self, siting: str = "") -> None:
        self._planes = color.ToRgbPlanes(siting)

    def __call__(self, frame: av.VideoFrame, out_HWC: np.ndarray, *, path) -> None:
        """Writes uint8 [H, W, 3] into `out_HWC`; MediaError where the frame has another size."""
        matrix = _display_matrix(frame)
        for channel, plane in enumerate(self._planes(frame)):
            shown = _upright(plane, matrix)
            if shown.shape != out_HWC.shape[:2]:
                height, width = out_HWC.shape[:2]
                raise MediaError(
                    f"{path}: the frame size changes from {width}x{height} to "
                    f"{shown.shape[1]}x{shown.shape[0]}; re-encode it at one size"
                )
            out_HWC[..., channel] = shown


def _display_matrix(frame: av.VideoFrame) -> tuple[int, int, int, int]:
    """(a, b, c, d), by which the stored pixel (x, y) is shown at (a x + c y, b x + d y), x to the
    right and y down (ISO/IEC 14496-12, 8.3.2), in units of which only the signs matter here."""
    entries: Any = frame.side_data  # whose stubs have it as a mapping
    for entry in entries:
        if entry.type == SideDataType.DISPLAYMATRIX:
            a, b, _, c, d, *_ = np.frombuffer(bytes(entry)[:36], np.int32).tolist()
            return a, b, c, d
    return 1, 0, 0, 1


def _upright(plane_HW: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """A plane turned and mirrored as its display matrix says, to the nearest quarter turn."""
    a, b, c, d = matrix
    if _is_transposed(matrix):
        plane_HW, a, d = plane_HW.T, c, b
    return plane_HW[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def _is_transposed(matrix: tuple[int, int, int, int]) -> bool:
    a, b, _, _ = matrix
    return abs(b) > abs(a)


class StoredVideo:
    """Random access to an MP4 in memory that `encode_video` has made: decoding order is
    presentation order there, so its own table of frames is all that is needed.

    Raises:
      MediaError: calling it `name`, if the bytes are not such a video.
    """

    def __init__(self, data: bytes, *, name: str):
        self.name = name
        try:
            self._container: Any = av.open(io.BytesIO(data))
            self._stream = self._container.streams.video[0]
            self._stream.codec_context.thread_type = "NONE"
            entries = [(e.timestamp, e.is_keyframe) for e in self._stream.index_entries]
        except (av.FFmpegError, IndexError) as error:
            raise MediaError(f"{name}: damaged: not a stored video; prepare it again") from error
        self._pts = [timestamp for timestamp, _ in entries]
        self._keys = [index for index, (_, is_keyframe) in enumerate(entries) if is_keyframe]
        self._frames: Iterator[av.VideoFrame] | None = None
        self._next = 0  # the frame that `_frames` gives next
        self._to_rgb = _ToRgb()

    def close(self) -> None:
        self._container.close()

    def read_at(self, indices: Iterable[int]) -> np.ndarray:
        """Frames at ascending `indices`: uint8 [T, H, W, 3].

        Raises:
          MediaError: for frames out of range, or that cannot be decoded.
        """
        wanted = [int(index) for index in indices]
        if not 0 <= wanted[0] <= wanted[-1] < len(self._pts):
            raise MediaError(
                f"{self.name}: damaged: frames {wanted[0]} to {wanted[-1]} asked for, of "
                f"{len(self._pts)}; prepare it again"
            )
        height, width = self._stream.height, self._stream.width
        out = np.empty((len(wanted), height, width, 3), np.uint8)
        try:
            for place, index in enumerate(wanted):
                self._to_rgb(self._frame(index), out[place], path=self.name)
        except (av.FFmpegError, EOFError) as error:
            self._frames = None
            raise MediaError(
                f"{self.name}: damaged: frame {index} cannot be decoded; prepare it again"
            ) from error
        return out

    def _frame(self, index: int) -> av.VideoFrame:
        key = self._keys[bisect_right(self._keys, index) - 1]
        if self._frames is None or not (key <= self._next <= index):
            self._container.seek(self._pts[key], stream=self._stream)
            self._frames, self._next = self._container.decode(self._stream), key
        while True:
            frame = next(self._frames, None)
            if frame is None or frame.pts != self._pts[self._next] or frame.is_corrupt:
                raise EOFError
            self._next += 1
            if self._next > index:
                return frame


# ---- frames without a file


def yuv_to_rgb(
    data: bytes, *, pixel_format: str, height: int, width: int, full_range: bool, siting: str
) -> np.ndarray:
    """uint8 [H, W, 3] of a planar frame's bytes, 8 bits a sample: yuv420p, yuv422p, yuv444p or
    gray. The matrix is BT.709 from 720 lines, else BT.601, as for files that name none; `siting`
    is as in `color`."""
    frame = av.VideoFrame(width, height, pixel_format)
    if full_range:
        frame.color_range = ColorRange.JPEG
    at = 0
    for plane in frame.planes:
        lines = np.zeros((plane.buffer_size // plane.line_size, plane.line_size), np.uint8)
        size = plane.height * plane.width
        samples = np.frombuffer(data, np.uint8, count=size, offset=at)
        lines[: plane.height, : plane.width] = samples.reshape(plane.height, plane.width)
        plane.update(lines.tobytes())
        at += size
    out = np.empty((height, width, 3), np.uint8)
    _ToRgb(siting)(frame, out, path="a frame")
    return out


# ---- opening and checking video


def _index_video(path: str, *, threads: int, limits: MediaLimits) -> _VideoIndex:
    if file_kind(path) != "video":
        raise MediaError(f"{path}: an image; a video is needed here")
    container, stream = _open_video(path, threads=threads, limits=limits)
    with container:
        codec = stream.codec_context.codec.canonical_name
        try:
            packets: list[_PacketFacts] = []
            for packet in container.demux(stream):
                if packet.size:
                    packets.append(_PacketFacts.of(packet))
                if codec in _WITHOUT_ZEROS and _HOLE in memoryview(packet).tobytes():
                    raise MediaError(
                        f"{path}: damaged: of frame {len(packets) - 1} zeros are left; copy it "
                        "again or delete it"
                    )
                if len(packets) > limits.frames:
                    raise MediaError(
                        f"{path}: more than {limits.frames} frames; cut it into pieces or delete it"
                    )
        except av.FFmpegError as error:
            raise MediaError(
                f"{path}: damaged ({error.strerror}); re-encode or delete it"
            ) from error
        _require_whole(path, container, stream, packets=packets)
        if fault := containers.structure_fault(path):
            raise MediaError(f"{path}: {fault}; copy it again, re-encode or delete it")
        stated, tick = float(stream.average_rate or stream.guessed_rate or 0), stream.time_base
        seconds = _seconds(stream, packets)
        if seconds > limits.seconds:
            raise MediaError(
                f"{path}: {seconds:.0f} seconds are more than {limits.seconds:g}; cut it into "
                "pieces or delete it"
            )
        is_timed = container.format.name not in _UNTIMED or codec in _INTRA_CODECS
        has_audio = len(container.streams.audio) > 0
    height, width = _shown_size(path, threads=threads)
    keyframes: tuple[int, ...] = ()
    if is_timed and codec in _SEEKABLE_CODECS and _is_orderly(packets):
        pts = times = tuple(sorted(_known_pts(packets)))
        keyframes = tuple(sorted(_known_pts([packet for packet in packets if packet.is_keyframe])))
    else:
        times = _times_when_decoded(path, threads=threads)
        pts = tuple(range(len(times)))
        if not is_timed or None in times:
            times = pts
            tick = 1 / Fraction(stated).limit_denominator(1001) if stated else Fraction(1, 1)
    fps = _mean_rate(times, stated=stated, tick=tick)
    return _VideoIndex(pts, times, keyframes, fps, _is_even(times), height, width, has_audio)


def _mean_rate(times: tuple[int, ...], *, stated: float, tick: Fraction) -> float:
    """The frames but one over the time from the first to the last; `stated` where that is the
    same, but for how finely times are written, as it is often more exact."""
    span = float((times[-1] - times[0]) * tick)
    if span <= 0 or (stated and abs((len(times) - 1) / stated - span) <= 2 * tick):
        return stated
    return (len(times) - 1) / span


def _is_even(times: tuple[int, ...]) -> bool:
    """Whether no frame is half a frame or more from its place at a constant rate."""
    step = (times[-1] - times[0]) / max(1, len(times) - 1)
    return all(
        abs(at - times[0] - number * step) < max(1, step / 2) for number, at in enumerate(times)
    )


def _seconds(stream, packets: list["_PacketFacts"]) -> float:
    times = [packet.end for packet in packets if packet.end is not None]
    return float((max(times) - min(times)) * stream.time_base) if times else 0.0


@dataclass(frozen=True)
class _PacketFacts:
    pts: int | None
    end: int | None
    is_keyframe: bool
    is_shown: bool
    is_corrupt: bool

    @classmethod
    def of(cls, packet: av.Packet) -> "_PacketFacts":
        start = packet.pts if packet.pts is not None else packet.dts
        end = None if start is None else start + (packet.duration or 0)
        return cls(packet.pts, end, packet.is_keyframe, not packet.is_discard, packet.is_corrupt)


def _known_pts(packets: list[_PacketFacts]) -> list[int]:
    return [packet.pts for packet in packets if packet.pts is not None]


def _is_orderly(packets: list[_PacketFacts]) -> bool:
    """Whether the packets alone say which frames there are and where decoding may start."""
    pts = _known_pts(packets)
    return (
        len(set(pts)) == len(packets)
        and all(packet.is_shown for packet in packets)
        and packets[0].is_keyframe
        and packets[0].pts == min(pts)
    )


def _open_video(path: str, *, threads: int, limits: MediaLimits | None = None):
    """The opened container and its video stream; the caller closes the container.

    `limits` are looked at when a file is first opened, None afterwards.
    """
    _require_file(path)
    try:
        container = av.open(_file_url(path))
    except av.FFmpegError as error:
        raise MediaError(f"{path}: {_why_unreadable(path)}") from error
    films = [s for s in container.streams.video if not s.disposition & _NO_FILM]
    best = container.streams.best("video")
    if not films:
        container.close()
        what = "only the cover picture of a sound file" if best else "no video"
        raise MediaError(f"{path}: holds {what}; delete it")
    stream = best if best in films else max(films, key=lambda s: s.height * s.width)
    stream.codec_context.thread_count = threads
    stream.codec_context.thread_type = "NONE" if threads == 1 else "AUTO"
    try:
        if limits is not None:
            _require_sane_size(path, stream.height, stream.width, limits=limits)
    except MediaError:
        container.close()
        raise
    return container, stream


def _why_unreadable(path: str) -> str:
    with open(path, "rb") as file:
        is_mp4 = file.read(8)[4:] == b"ftyp"
    if is_mp4:
        return "truncated or damaged: its frame table (moov) is missing; copy it again or delete it"
    return "not a video, whatever its suffix; delete it"


def _require_whole(path: str, container, stream, *, packets: list[_PacketFacts]) -> None:
    """Raises MediaError where the file ends before what its own tables announce."""
    readable = sum(not packet.is_corrupt for packet in packets)
    announced = len(packets)
    size = os.path.getsize(path)
    ends = [packet.end for packet in packets if packet.end is not None]
    entries = stream.index_entries
    if container.format.name == "avi" and ends and max(ends) < stream.frames:
        announced = stream.frames  # its clock counts frames, the skipped ones too
    if container.format.name == "gif":
        announced = max(announced, stream.frames)
        if not _gif_ends_well(path):
            readable = min(readable, len(packets) - 1)
    if "mp4" in container.format.name and len(entries):
        announced = max(announced, len(entries))
        readable = min(readable, sum(entry.pos + entry.size <= size for entry in entries))
    if announced == 0:
        raise MediaError(f"{path}: empty or truncated: no frame is readable; delete it")
    if readable < announced:
        raise MediaError(
            f"{path}: truncated: {readable} of {announced} frames are readable; "
            "re-encode or delete it"
        )
    if size < _announced_bytes(path):
        raise MediaError(
            f"{path}: truncated: {size} of {_announced_bytes(path)} bytes are there, with "
            f"{readable} frames; re-encode or delete it"
        )


def _gif_ends_well(path: str) -> bool:
    """Whether the blocks of a GIF lead to its end mark: decoders fill what is cut off silently."""
    data = Path(path).read_bytes()

    def after_color_table(at: int, flags: int) -> int:
        return at + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)

    try:
        at = after_color_table(13, data[10])
        while data[at] != 0x3B:
            if data[at] == 0x2C:  # a frame: descriptor, color table, code size, data
                at = after_color_table(at + 10, data[at + 9]) + 1
            else:  # an extension: mark, label, data
                at += 2
            while data[at]:
                at += data[at] + 1
            at += 1
    except IndexError:
        return False
    return True


def _announced_bytes(path: str) -> int:
    """The file size by the outermost length field of a RIFF (avi) or Matroska file, else 0."""
    with open(path, "rb") as file:
        head = file.read(4096)
    if head[:4] == b"RIFF":
        return 8 + int.from_bytes(head[4:8], "little")
    if head[:4] != b"\x1a\x45\xdf\xa3":
        return 0
    start, length = _ebml_length(head, 4)  # the header element, and after it the segment
    start, length = _ebml_length(head, (start + (length or 0)) + 4)
    return 0 if length is None else start + length


def _ebml_length(data: bytes, at: int) -> tuple[int, int | None]:
    """Where an element's content starts and its length, None if left open as in a live stream."""
    if at >= len(data) or data[at] == 0:
        return at, None
    width = 9 - data[at].bit_length()
    value_bits = (1 << 7 * width) - 1
    length = int.from_bytes(data[at : at + width], "big") & value_bits
    return at + width, None if length == value_bits else length


def _shown_size(path: str, *, threads: int) -> tuple[int, int]:
    """Height and width of the first frame after its rotation; MediaError if it does not decode."""
    decoding = _start_decoding(path, threads=threads)
    with decoding.container:
        try:
            frame = next(decoding.frames, None)
        except av.FFmpegError:
            frame = None
        if frame is None:
            raise MediaError(f"{path}: damaged: no frame can be decoded; delete it")
        turned = _is_transposed(_display_matrix(frame))
        return (frame.width, frame.height) if turned else (frame.height, frame.width)


def _times_when_decoded(path: str, *, threads: int) -> tuple[Any, ...]:
    """The timestamps, or None, of all frames that decoding gives, in their order: slow, for files
    whose packets do not tell."""
    decoding = _start_decoding(path, threads=threads)
    times: list[int | None] = []
    with decoding.container:
        try:
            for frame in decoding.frames:
                if frame.is_corrupt:
                    raise MediaError(
                        f"{path}: damaged after {len(times)} frames; re-encode or delete it"
                    )
                times.append(frame.pts)
        except av.FFmpegError as error:
            raise MediaError(
                f"{path}: damaged after {len(times)} frames ({error.strerror}); re-encode or "
                "delete it"
            ) from error
    return tuple(times)


# ---- writing video


def write_video(
    path,
    frames: np.ndarray | Iterable[np.ndarray],
    *,
    fps: float,
    crf: int = 18,
    codec: str = "libx264",
    chroma: str = "4:2:0",
    gop: int = 16,
    b_frames: int = 0,
) -> None:
    """Writes uint8 [T, H, W, 3] as a video of `fps` frames a second to .mp4, .mov, .m4v or .mkv.

    `frames` may also come one [H, W, 3] after the other: few of them are then held at a time.
    codec 'libx264' (BT.709; with `chroma` 4:2:0 odd sizes are padded by repeating the edge, with
    4:4:4 they are kept), 'libx264rgb' (lossless with crf 0), or 'ffv1' (lossless, .mkv only).
    `crf` is x264's quality, lower is better; `gop` the most frames from one keyframe to the next.
    The file appears whole or not at all. Raises UsageError for bad arguments and RunError where
    the encoder fails.
    """
    if isinstance(frames, np.ndarray):
        frames = _require_rgb(frames, dims=4)
    suffix = Path(path).suffix.lower()
    if codec not in _WRITE_FORMATS:
        raise UsageError(f"codec {codec!r} is not one of {' '.join(sorted(_WRITE_FORMATS))}")
    if suffix not in _WRITE_SUFFIXES or (codec == "ffv1" and suffix != ".mkv"):
        raise UsageError(f"{path}: {codec} goes into {'.mkv' if codec == 'ffv1' else '.mp4'}")
    if chroma not in _CHROMA:
        raise UsageError(f"chroma {chroma!r} is not one of {', '.join(_CHROMA)}")
    if fault := rate_fault(path, fps):
        raise UsageError(fault)
    with _written_whole(path) as temporary:
        container_options = {} if suffix == ".mkv" else {"movflags": "+faststart"}
        try:
            with av.open(_file_url(temporary), "w", options=container_options) as container:
                _encode(
                    container,
                    _of_one_size(frames),
                    fps=fps,
                    crf=crf,
                    codec=codec,
                    chroma=chroma,
                    gop=gop,
                    b_frames=b_frames,
                    threads=0,
                )
        except av.FFmpegError as error:
            raise RunError(f"{path}: {codec} failed: {error}") from error


def is_rate(fps: float) -> bool:
    """Whether a video of `fps` frames a second can be written."""
    return SLOWEST <= fps <= FASTEST


def rate_fault(path, fps: float) -> str:
    """Why a video of `fps` frames a second cannot be written to `path`; "" if it can."""
    if not is_rate(fps):
        return f"{path}: fps is {fps:g}; a video has from {SLOWEST:g} to {FASTEST:,}"
    if Path(path).suffix.lower() == ".mkv" and fps > 1000:
        return f"{path}: fps is {fps:g}; .mkv has times in milliseconds, so at most 1000"
    return ""


def _exact_rate(fps: float) -> Fraction:
    """The fraction that is meant: 23.976 is 24000 / 1001, 0.00027778 one in an hour."""
    if fps >= 1:
        return Fraction(fps).limit_denominator(1001)
    return 1 / Fraction(1 / fps).limit_denominator(1001)


def _of_one_size(frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    size = None
    for frame in frames:
        pixels = _require_rgb(frame, dims=3)
        size = size or pixels.shape
        if pixels.shape != size:
            raise UsageError(f"a frame of {pixels.shape} follows one of {size}: give one size")
        yield pixels
    if size is None:
        raise UsageError("there are no frames to write: give at least one")


def encode_video(frames: Iterable[np.ndarray], *, fps: float, crf: int, gop: int = 8) -> bytes:
    """Frames uint8 [H, W, 3], one after the other, as an MP4 for `StoredVideo` to read.

    H.264 without frames out of order; odd sizes are padded by repeating the edge. The same bytes
    on every machine: one encoder thread. Raises RunError where the encoder fails.
    """
    file = io.BytesIO()
    try:
        with av.open(file, "w", format="mp4") as container:
            _encode(
                container,
                frames,
                fps=fps,
                crf=crf,
                codec="libx264",
                chroma="4:2:0",
                gop=gop,
                b_frames=0,
                threads=1,
            )
    except av.FFmpegError as error:
        raise RunError(f"libx264 failed: {error}") from error
    return file.getvalue()


def _encode(
    container, frames: Iterable[np.ndarray], *, fps, crf, codec, chroma, gop, b_frames, threads
):
    rate = _exact_rate(fps)
    # With mbtree, x264's bytes hang on where its memory happens to lie.
    options = {} if codec == "ffv1" else {"crf": str(crf), "mbtree": "0"}
    is_yuv = codec == "libx264"
    if is_yuv:
        options |= color.WRITTEN_OPTIONS
    stream = container.add_stream(codec, rate=rate, options=options)
    stream.pix_fmt = _CHROMA[chroma] if codec == "libx264" else _WRITE_FORMATS[codec]
    stream.codec_context.gop_size = gop
    stream.codec_context.max_b_frames = b_frames
    stream.codec_context.thread_count = threads
    if is_yuv:
        stream.codec_context.colorspace = Colorspace.ITU709
        to_yuv = color.FromRgb(stream.pix_fmt)
    for number, pixels in enumerate(frames):
        height, width, _ = pixels.shape
        if stream.pix_fmt == "yuv420p":
            pad = ((0, height % 2), (0, width % 2), (0, 0))
            height, width = height + height % 2, width + width % 2
        if number == 0:
            stream.height, stream.width = height, width
        even = pixels if pixels.shape[:2] == (height, width) else np.pad(pixels, pad, mode="edge")
        if is_yuv:
            frame = to_yuv(even)
        else:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(even), format="rgb24")
        frame.pts, frame.time_base = number, 1 / rate
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


@dataclass(frozen=True)
class Recompressed:
    """A clip as a codec gives it back: frames uint8 [T, H, W, 3], and the bytes that hold them,
    of the codec's stream alone without a container and without what the encoder says of itself."""

    frames: np.ndarray
    stream_bytes: int


# At their slow presets: what these codecs can do, not what they do in a hurry.
_CODEC_OPTIONS = {"libx264": {"preset": "veryslow"}, "libsvtav1": {"preset": "4"}}
COMPARED_CODECS = {"libx264": 51, "libsvtav1": 63}  # and the highest crf, the coarsest, of each
_ABOUT_THE_ENCODER = "filter_units=remove_types=6"  # H.264 SEI: x264 lists its options there


def recompress(frames_THWC, *, fps: float, codec: str, crf: int) -> Recompressed:
    """Frames uint8 [T, H, W, 3] of even sizes through a codec of COMPARED_CODECS and back.

    4:2:0, BT.709, one long group of pictures with frames out of order: the codec at its best, for
    comparisons of size. Raises UsageError for bad arguments and RunError where the codec fails.
    """
    frames_THWC = _require_rgb(frames_THWC, dims=4)
    count, height, width, _ = frames_THWC.shape
    if not 0 <= crf <= COMPARED_CODECS.get(codec, -1):
        raise UsageError(f"codec {codec!r} with crf {crf}: of {COMPARED_CODECS}, codec: highest")
    if height % 2 or width % 2 or not fps > 0:
        raise UsageError(f"{width}x{height} at {fps} frames a second: crop to even sizes, fps > 0")
    file = io.BytesIO()
    try:
        with av.open(file, "w", format="matroska") as container:
            _encode_for_size(container, frames_THWC, fps=fps, codec=codec, crf=crf)
        out = np.empty_like(frames_THWC)
        to_rgb = _ToRgb()
        with av.open(io.BytesIO(file.getvalue()), "r") as container:
            decoded = 0
            for frame in container.decode(video=0):
                to_rgb(frame, out[decoded], path=codec)
                decoded += 1
        with av.open(io.BytesIO(file.getvalue()), "r") as container:
            stream = container.streams.video[0]
            sizes = [len(stream.codec_context.extradata or b"")]
            sizes += [packet.size for packet in _packets_of_pictures(container, stream)]
    except (av.FFmpegError, IndexError) as error:
        raise RunError(f"{codec} failed: {error}") from error
    if decoded != count:
        raise RunError(f"{codec} gave {decoded} of {count} frames back")
    return Recompressed(out, sum(sizes))


def _encode_for_size(container, frames_THWC: np.ndarray, *, fps, codec, crf) -> None:
    rate = _exact_rate(fps)
    options = {"crf": str(crf)} | _CODEC_OPTIONS[codec] | color.WRITTEN_OPTIONS
    stream = container.add_stream(codec, rate=rate, options=options)
    stream.height, stream.width = frames_THWC.shape[1:3]
    stream.pix_fmt = "yuv420p"
    stream.codec_context.gop_size = len(frames_THWC)
    stream.codec_context.colorspace = Colorspace.ITU709
    to_yuv = color.FromRgb(stream.pix_fmt)
    for number, pixels in enumerate(frames_THWC):
        frame = to_yuv(pixels)
        frame.pts, frame.time_base = number, 1 / rate
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def _packets_of_pictures(container, stream) -> Iterator[av.Packet]:
    if stream.codec_context.name != "h264":
        yield from container.demux(stream)
        return
    clean = BitStreamFilterContext(_ABOUT_THE_ENCODER, stream)
    for packet in container.demux(stream):
        yield from clean.filter(packet if packet.size else None)


# ---- checks that several of the above share


@contextmanager
def _written_whole(path) -> Iterator[str]:
    """A temporary name beside `path`, moved there when the block ends well, else removed."""
    path = Path(path)
    if not path.parent.is_dir():
        raise UsageError(f"{path}: its folder does not exist; make it first")
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex}{path.suffix}")
    try:
        yield str(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _file_url(path) -> str:
    """`path` as ffmpeg takes no part of it for a protocol, such as that of `12:30.mp4`."""
    return f"file:{os.fspath(path)}"


def _require_file(path) -> None:
    if not os.path.exists(path):
        raise MediaError(f"{path}: no such file; check the path")
    if not os.path.isfile(path):
        raise MediaError(f"{path}: not a file; name one image or video")
    if os.path.getsize(path) == 0:
        raise MediaError(f"{path}: empty; copy it again or delete it")
    if not os.access(path, os.R_OK):
        raise MediaError(f"{path}: no permission to read it; mend its permissions")


def _require_sane_size(path, height: int, width: int, *, limits: MediaLimits) -> None:
    if height * width > limits.pixels:
        raise MediaError(
            f"{path}: {width}x{height} is more than {limits.pixels} pixels; scale it down or "
            "delete it"
        )


def _require_rgb(pixels, *, dims: int) -> np.ndarray:
    pixels = np.asarray(pixels)
    if pixels.dtype != np.uint8 or pixels.ndim != dims or pixels.shape[-1] != 3 or not pixels.size:
        shape = "[H, W, 3]" if dims == 3 else "[T, H, W, 3]"
        raise UsageError(f"expected uint8 {shape}, all above 0, got {pixels.dtype} {pixels.shape}")
    return pixels
