"""The tiles of a clip that is coded as it comes: only one of them has its caches in memory.

A tile of a frame is coded as a clip of its own, and sees what its earlier blocks have left in its
caches. Those of a large frame are many times what a device holds, and nothing can be left out of
them or computed again: what is in them goes back to the first block. So while one tile is coded,
the caches of the others are in a temporary file.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from elastictok_jax.tokenizer.cache import Cache

T = TypeVar("T")


class Lanes(Generic[T]):
    """One coder or decoder a tile.

    Args:
      make: makes a fresh one; caches: those of one.
      tiles: how many.
    """

    def __init__(
        self, make: Callable[[], T], *, tiles: int, caches: Callable[[T], list[Cache]]
    ) -> None:
        self._lanes, self._caches = [make() for _ in range(tiles)], caches
        self._files: list[Any] = [None] * tiles

    @contextlib.contextmanager
    def tile(self, number: int) -> Iterator[T]:
        """The coder of a tile, with its caches in memory while inside."""
        lane = self._lanes[number]
        if self._files[number] is not None:
            self._files[number].seek(0)
            for cache in self._caches(lane):
                cache.read(self._files[number])
        yield lane
        if len(self._lanes) > 1:
            if self._files[number] is None:
                self._files[number] = tempfile.TemporaryFile()  # noqa: SIM115
            self._files[number].seek(0)
            for cache in self._caches(lane):
                cache.write(self._files[number])
