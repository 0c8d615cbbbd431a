"""Reads image and video files as a data source."""

import hashlib
from pathlib import Path

import numpy as np

from elastictok_jax.data import media
from elastictok_jax.data.media.open_videos import OpenVideos
from elastictok_jax.data.sources.base import name_hash
from elastictok_jax.data.sources.listing import list_media
from elastictok_jax.paths import path_text

EMBEDDED = Path(__file__).parents[1] / "embedded"


class FileSource:
    """Reads image and video files of a folder (recursively), a glob or a path on demand.

    Every file is probed, and damaged ones are skipped; see `base.Source`.

    Attributes:
      damaged: what is wrong with each skipped file or folder.
      ignored: the number of files of each suffix that are neither images nor videos.
      losses: files by what reading them loses.

    Raises:
      UsageError: if the folder is missing or empty.
    """

    def __init__(self, path: str | Path):
        listing = list_media(path)
        self.damaged = [f"{path}: {reason}" for path, reason in listing.unreadable.items()]
        self.ignored = listing.ignored
        self.losses: dict[str, list[str]] = {}
        self._infos, self._names = [], []
        for file in listing.files:
            try:
                self._infos.append(media.probe(file))
                loss = media.probe_media_loss(file)
            except media.MediaError as error:
                self.damaged.append(str(error))
            else:
                self._names.append(listing.name(file))
                if loss:
                    self.losses.setdefault(loss, []).append(path_text(file))
        self.is_video = np.array([info.kind == "video" for info in self._infos], bool)
        self.frames = np.array([info.frames for info in self._infos], np.int64)
        self.fps = np.array([info.fps for info in self._infos], np.float64)
        self.place = np.array([name_hash(name) for name in self._names], np.uint64)
        listed = list(zip(self._names, self.frames.tolist(), strict=True))
        self.fingerprint = hashlib.sha256(repr(listed).encode()).hexdigest()[:16]
        self._videos = OpenVideos()

    def name(self, item: int) -> str:
        return self._names[item]

    def read(self, item: int, indices: np.ndarray, *, side: int) -> np.ndarray:
        info = self._infos[item]
        if info.kind == "image":
            image = media.crop_long_strip(media.read_frames(info.path))
            return media.resize_shortest(image, side=side, name=info.path)
        return self._open(info.path).read_at(indices, side=side, longest=media.LONGEST)

    def _open(self, path: str) -> media.VideoReader:
        return self._videos.open(path, lambda: media.VideoReader(path))
