"""Cuts clips of any size into blocks of the model's size, and joins them again."""

from collections.abc import Iterable, Iterator

import numpy as np
from einops import rearrange

from elastictok_jax.data.media.geometry import require_clip_or_image
from elastictok_jax.errors import UsageError
from elastictok_jax.models.base import Geometry


class TileGrid:
    """The tiles of a clip, top to bottom and left to right, each coded as a separate clip.

    Args:
      size: frames, height and width of the clip, each at least 1.
    """

    def __init__(self, size: tuple[int, int, int], geometry: Geometry) -> None:
        self.frames, self.height, self.width = size
        self._geometry, self._side = geometry, geometry.side
        self.frames_per_block = geometry.frames
        self.blocks = -(-self.frames // self.frames_per_block)
        self.rows, self.columns = -(-self.height // self._side), -(-self.width // self._side)
        self.tiles = self.rows * self.columns

    @property
    def time_first(self) -> list[int]:
        """Indices that permute blocks from (tile, time) order to (time, tile) order."""
        order = np.arange(self.tiles * self.blocks).reshape(self.tiles, self.blocks)
        return order.T.reshape(-1).tolist()

    @property
    def pixels(self) -> np.ndarray:
        """int64 [N], pixels of the clip in each block, time first."""

        def shares(length: int, step: int) -> np.ndarray:
            return np.diff(np.minimum(np.arange(0, length + step, step), length))

        times = shares(self.frames, self.frames_per_block)
        rows, columns = shares(self.height, self._side), shares(self.width, self._side)
        return np.einsum("t,r,k->trk", times, rows, columns).reshape(-1)

    def describe(self) -> str:
        """Returns text on how a frame of another size than the model's is coded, else ""."""
        rows, columns, side = self.rows, self.columns, self._side
        parts = []
        if self.tiles > 1:
            parts.append(f"coded in {rows}x{columns} tiles of {side}x{side}")
        if (self.height, self.width) != (rows * side, columns * side):
            parts.append(f"padded to {columns * side}x{rows * side}")
        return f"{self.width}x{self.height} is {', '.join(parts)}" if parts else ""

    def cut(self, video_THWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the blocks uint8 [tiles, N, F, R, R, 3] of a clip of this size, and a mask.

        Blocks are padded by repeating the edge of the clip; the mask, bool of the same shape, is
        false there.
        """
        slack = (
            (0, self.blocks * self.frames_per_block - self.frames),
            (0, self.rows * self._side - self.height),
            (0, self.columns * self._side - self.width),
            (0, 0),
        )
        inside = np.pad(np.ones(video_THWC.shape, bool), slack)
        return self._tiles(np.pad(video_THWC, slack, mode="edge")), self._tiles(inside)

    def cut_tile(self, video_THWC: np.ndarray, tile: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns `cut` of one tile alone: [N, F, R, R, 3] each."""
        row, column = divmod(tile, self.columns)
        top, left = row * self._side, column * self._side
        part = video_THWC[:, top : top + self._side, left : left + self._side]
        one = TileGrid((self.frames, *part.shape[1:3]), self._geometry)
        blocks, inside = one.cut(part)
        return blocks[0], inside[0]

    def _tiles(self, video_THWC: np.ndarray) -> np.ndarray:
        return rearrange(
            video_THWC,
            "(n f) (r h) (k w) c -> (r k) n f h w c",
            f=self.frames_per_block,
            r=self.rows,
            k=self.columns,
        )

    def join(self, tiles: np.ndarray, *, block: int) -> np.ndarray:
        """Returns the cropped frames uint8 [t, H, W, 3] of one block [tiles, F, R, R, 3]."""
        video = rearrange(tiles, "(r k) t h w c -> t (r h) (k w) c", r=self.rows, k=self.columns)
        frames = self.frames - block * self.frames_per_block  # the last block may have fewer frames
        return video[:frames, : self.height, : self.width]


def frames_in_blocks(frames: Iterable[np.ndarray], frames_per_block: int) -> Iterator[np.ndarray]:
    """Groups frames uint8 [H, W, 3] or [t, H, W, 3] into blocks [F, H, W, 3], the last one shorter.

    Raises:
      UsageError: if an item is not a frame, or has another size than the first.
    """
    held: list[np.ndarray] = []
    size = None
    for some in frames:
        for frame in require_clip_or_image(np.asarray(some)):
            size = size or frame.shape
            if frame.shape != size:
                raise UsageError(f"a frame of {frame.shape} follows one of {size}: give one size")
            held.append(frame)
            if len(held) == frames_per_block:
                yield np.stack(held)
                held = []
    if held:
        yield np.stack(held)
