"""Reads frames of a video file in any order, exactly as sequential decoding gives them.

Frames are found by presentation timestamp, never by frame rate, and each frame that a seek
returns is checked against the timestamps of the full file.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import replace

import av
import numpy as np

from elastictok_jax.data.frame_rate import (
    count_frames_at_rate,
    frame_rate_step,
    recorded_frames_at_rate,
)
from elastictok_jax.data.media.decoding import Decoding, decoding_frame_times, start_decoding
from elastictok_jax.data.media.file_kinds import file_kind
from elastictok_jax.data.media.files import LIMITS, MediaError, MediaLimits
from elastictok_jax.data.media.geometry import (
    center_crop,
    cropped_strip_size,
    resize,
    resize_shortest,
    scaled_size,
)
from elastictok_jax.data.media.images import read_image
from elastictok_jax.data.media.video_index import index_video

_KEYFRAMES_TO_TRY = 4
_WORTH_A_SEEK = 32  # unwanted frames between two wanted ones


class VideoReader:
    """Gives exact random access to the frames of one video file.

        with VideoReader("clip.mp4") as reader:
            frames = reader.read(reader.frame_count - 8, 8)  # uint8 [8, H, W, 3]

    Opening demuxes the file once and decodes its first frame; MediaError says what is wrong with
    it. A read that starts where the last one ended costs no seek. `threads` is the number of
    decoding threads, 0 for one a core. Not thread-safe.
    """

    def __init__(self, path, *, threads: int = 1, limits: MediaLimits = LIMITS):
        self.path = str(path)
        self._threads = threads
        self._index = index_video(self.path, threads=threads, limits=limits)
        self._decoding: Decoding | None = None
        self._was_counted = False

    frame_count = property(lambda self: len(self._index.pts), doc="Number of frames.")
    fps = property(lambda self: self._index.fps, doc="Mean frame rate, frames a second.")
    height = property(lambda self: self._index.height, doc="Pixels, as shown.")
    width = property(lambda self: self._index.width, doc="Pixels, as shown.")
    has_audio = property(lambda self: self._index.has_audio, doc="Whether the file has sound.")
    evenly_spaced = property(lambda self: self._index.is_even, doc="Whether fps is constant.")

    def indices_at(self, fps: float) -> np.ndarray:
        """Returns the frames nearest to 0, 1 / fps, 2 / fps, ... seconds: int64, ascending.

        Returns every frame once if `fps` is not below the video's own.
        """
        step = float(frame_rate_step(self.fps, fps))
        numbers = np.arange(int(count_frames_at_rate(self.frame_count, step)))
        if self.evenly_spaced or step == 1:
            return recorded_frames_at_rate(numbers, step=step, frames=self.frame_count)
        times = np.asarray(self._index.times, np.float64) - self._index.times[0]
        times *= (self.frame_count - 1) / times[-1]  # in frames at the mean rate
        return np.searchsorted((times[1:] + times[:-1]) / 2, numbers * step, side="right")

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; a later read reopens it."""
        if self._decoding is not None:
            self._decoding.container.close()
            self._decoding = None

    def read(self, start: int, count: int, *, side: int | None = None) -> np.ndarray:
        """Reads frames start .. start + count - 1: uint8 [count, H, W, 3]; see `read_at`."""
        if start < 0 or count < 0 or start + count > self.frame_count:
            raise MediaError(
                f"{self.path}: frames {start} to {start + count - 1} requested, "
                f"but it has 0 to {self.frame_count - 1}"
            )
        return self.read_at(range(start, start + count), side=side)

    def read_at(
        self, indices: Iterable[int], *, side: int | None = None, longest: int | None = None
    ) -> np.ndarray:
        """Reads frames at ascending `indices`: uint8 [T, H, W, 3].

        Crops to `longest` as `crop_long_strip`, then resizes to `side` as `resize_shortest`.
        Only one frame is held at full size. Raises MediaError for frames out of range, for frames
        that cannot be decoded and if `side` makes them larger than LIMITS.
        """
        wanted = [int(index) for index in indices]
        height, width = self.height, self.width
        if longest is not None:
            height, width = cropped_strip_size(height, width, longest=longest)
        crop = (height, width)
        if side is not None:
            height, width = scaled_size(height, width, side=side, name=self.path)
        out = np.empty((len(wanted), height, width, 3), np.uint8)
        if wanted and (wanted[0] < 0 or wanted[-1] >= self.frame_count):
            raise MediaError(
                f"{self.path}: frames {wanted[0]} to {wanted[-1]} requested, "
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
        # The container's timestamps may be wrong: count frames instead, but try that only once.
        if self._index.keyframes and not self._was_counted:
            self._was_counted = True
            counted = decoding_frame_times(self.path, threads=self._threads)
            if len(counted) == self.frame_count:
                self._index = replace(self._index, pts=tuple(range(len(counted))), keyframes=())
                if self._try_run(wanted, crop=crop, out=out):
                    return
        raise MediaError(
            f"{self.path}: damaged: frames {wanted[0]} to {wanted[-1]} cannot all be decoded; "
            "re-encode or delete it"
        )

    def _try_run(self, wanted: list[int], *, crop: tuple[int, int], out: np.ndarray) -> bool:
        for decoding in self._ways_to(wanted[0]):
            self._decoding = decoding
            try:
                done = _take(
                    decoding, self._index, path=self.path, wanted=wanted, crop=crop, out=out
                )
            except BaseException:
                self.close()  # its position is unknown now
                raise
            if done:
                return True
        self.close()
        return False

    def _ways_to(self, start: int) -> Iterator[Decoding]:
        """Yields decoders that should reach frame `start`, the fastest first, the safest last."""
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
            yield start_decoding(self.path, threads=self._threads, seek_to=keyframes[key])
        self.close()
        yield start_decoding(self.path, threads=self._threads)


def _take(
    decoding, index, *, path, wanted: list[int], crop: tuple[int, int], out: np.ndarray
) -> bool:
    """Fills `out` with the frames at `wanted`; returns False if the decoder does not give them."""
    filled, number = 0, None  # number: of the next frame, once known
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
                    out[filled] = resize(pixels, height=out.shape[1], width=out.shape[2])
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


def read_frames(
    path, *, start: int = 0, count: int | None = None, side: int | None = None
) -> np.ndarray:
    """Reads frames start .. start + count - 1 of a video, or an image: uint8 [T, H, W, 3].

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
