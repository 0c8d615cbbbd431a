"""Keeps videos open between reads, since opening one demuxes it for its index."""

import collections
import threading
from collections.abc import Callable, Hashable
from typing import Any


class OpenVideos:
    """Caches up to `limit` open videos in each thread, as readers are not thread-safe.

    The least recently used is closed. Unpickling gives an empty cache.
    """

    def __init__(self, limit: int = 32):
        self._limit = limit
        self._local = threading.local()

    def open(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Returns the video kept under `key`, or opens it by `make`."""
        if not hasattr(self._local, "videos"):
            self._local.videos = collections.OrderedDict()
        videos = self._local.videos
        if key not in videos:
            videos[key] = make()
            if len(videos) > self._limit:
                videos.popitem(last=False)[1].close()
        videos.move_to_end(key)
        return videos[key]

    def __getstate__(self) -> int:
        return self._limit

    def __setstate__(self, limit: int) -> None:
        self.__init__(limit)  # type: ignore[misc]
