"""Codes the tiles of a clip as it comes, with what only one of them knows of its past in memory.

Each tile of a frame is coded as a clip of its own, and sees what its earlier blocks left in its KV
caches. Those of a large frame are many times what a device holds, and nothing can be left out of
them or computed again, since they go back to the first block. So while one tile is coded, the
caches of the others are in a temporary file.
"""

import contextlib
import math
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, Generic, Protocol, TypeVar

import jax
import numpy as np

T = TypeVar("T")


class HoldsPasts(Protocol):
    """A coder with `pasts`, a tree of arrays that is only needed while it codes."""

    pasts: Any


class Lanes(Generic[T]):
    """One coder for each tile.

    Args:
      make: makes one; coder: that of a lane which holds pasts.
      tiles: how many.
    """

    def __init__(
        self, make: Callable[[], T], *, tiles: int, coder: Callable[[T], HoldsPasts]
    ) -> None:
        self._lanes, self._coder = [make() for _ in range(tiles)], coder
        self._files: list[Any] = [None] * tiles
        self._stored: list[Any] = [None] * tiles

    @contextlib.contextmanager
    def tile(self, number: int) -> Iterator[T]:
        """Gives the lane of a tile, with its pasts in memory while inside."""
        lane = self._lanes[number]
        coder = self._coder(lane)
        if self._files[number] is not None:
            self._files[number].seek(0)
            coder.pasts = _read(self._files[number], self._stored[number])
        yield lane
        if len(self._lanes) > 1:
            if self._files[number] is None:
                self._files[number] = tempfile.TemporaryFile()  # noqa: SIM115
            self._files[number].seek(0)
            self._stored[number] = _write(self._files[number], coder.pasts)
            coder.pasts = None


def _write(file: BinaryIO, tree: Any) -> Any:
    """Writes the arrays of a tree, and returns what `_read` needs to know of them."""
    for leaf in jax.tree.leaves(tree):
        file.write(np.asarray(leaf).reshape(-1).view(np.uint8).data)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree
    )


def _read(file: BinaryIO, stored: Any) -> Any:
    """Reads what `_write` wrote, from the file's position on."""

    def read(like: jax.ShapeDtypeStruct) -> jax.Array:
        raw = np.empty(math.prod(like.shape) * like.dtype.itemsize, np.uint8)
        file.readinto(raw.data)  # type: ignore[attr-defined]
        return jax.device_put(raw.view(like.dtype).reshape(like.shape), like.sharding)

    return jax.tree.map(read, stored)
