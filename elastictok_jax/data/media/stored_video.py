"""Reads frames in any order from an MP4 in memory that `encode_video_bytes` made."""

import io
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import Any

import av
import numpy as np

from elastictok_jax.data.media.color import ToRgb
from elastictok_jax.data.media.files import MediaError


class StoredVideo:
    """Gives random access to an MP4 in memory that `encode_video_bytes` made.

    Its decoding order is presentation order, so its own table of frames is the index.

    Raises:
      MediaError: naming it `name`, if the bytes are not such a video.
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
        self._next = 0  # index of the next frame of `_frames`
        self._to_rgb = ToRgb()

    def close(self) -> None:
        """Frees the decoder."""
        self._container.close()

    def read_at(self, indices: Iterable[int]) -> np.ndarray:
        """Reads frames at ascending `indices`: uint8 [T, H, W, 3].

        Raises:
          MediaError: for frames that are out of range or cannot be decoded.
        """
        wanted = [int(index) for index in indices]
        if not 0 <= wanted[0] <= wanted[-1] < len(self._pts):
            raise MediaError(
                f"{self.name}: damaged: frames {wanted[0]} to {wanted[-1]} requested, of "
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
