"""Videos kept open between reads: opening one demuxes it for its index."""

import collections
import threading
from collections.abc import Callable, Hashable
from typing import Any


class OpenVideos:
    """Up to `limit` open videos in each thread, since one serves one thread; the least
    recently used is closed. Pickled, it arrives empty."""

    def __init__(self, limit: int = 32):
        self._limit = limit
        self._local = threading.local()

    def open(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The video kept under `key`, or what `make` opens."""
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
