"""Where items (images and uncut stretches of video) come from, in train and held-out splits."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Protocol

import ml_collections
import numpy as np

from elastictok_jax.data import media
from elastictok_jax.data.media.open_videos import OpenVideos
from elastictok_jax.data.sources.listing import ignored_text, list_media
from elastictok_jax.data.sources.synthetic import SyntheticSource
from elastictok_jax.data.sources.tfds_records import RecordSource, is_record_dataset
from elastictok_jax.errors import UsageError
from elastictok_jax.paths import has_scheme, input_path, path_text

SPLITS = ("train", "heldout")
EMBEDDED = Path(__file__).parents[1] / "embedded"


class Source(Protocol):
    """Items that can be read at random, from several threads, and pickled to other processes.

    Attributes, one entry an item:
      is_video: bool [n].
      frames: int64 [n], 1 for an image.
      fps: float64 [n], frames a second, 0 for an image.
      place: uint64 [n], hash of the name of the original, which decides its split.
      fingerprint: 16 hex digits of what decides which item is what.
    """

    is_video: np.ndarray
    frames: np.ndarray
    fps: np.ndarray
    place: np.ndarray
    fingerprint: str

    def name(self, item: int) -> str:
        """What to call an item in messages and pictures."""
        ...

    def read(self, item: int, indices: np.ndarray, *, side: int) -> np.ndarray:
        """Frames at ascending `indices`: uint8 [T, H, W, 3], min(H, W) = side; of a strip, what
        `media.middle` leaves of it.

        Raises:
          MediaError: naming the item and what is wrong with it.
        """
        ...


class FileSource:
    """Image and video files of a folder (nested), a glob or a path, decoded as they are asked for.

    Every file is probed; damaged ones are left out.

    Attributes:
      damaged: what is wrong with each file or folder that was left out.
      ignored: how many files of each suffix are neither images nor videos.
      losses: what of the others is lost on reading, with the files of which it is.

    Raises:
      UsageError: if the folder is missing, or nothing is there.
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
                loss = media.loss_on_reading(file)
            except media.MediaError as error:
                self.damaged.append(str(error))
            else:
                self._names.append(listing.name(file))
                if loss:
                    self.losses.setdefault(loss, []).append(path_text(file))
        self.is_video = np.array([info.kind == "video" for info in self._infos], bool)
        self.frames = np.array([info.frames for info in self._infos], np.int64)
        self.fps = np.array([info.fps for info in self._infos], np.float64)
        self.place = np.array([name_place(name) for name in self._names], np.uint64)
        listed = list(zip(self._names, self.frames.tolist(), strict=True))
        self.fingerprint = hashlib.sha256(repr(listed).encode()).hexdigest()[:16]
        self._videos = OpenVideos()

    def name(self, item: int) -> str:
        return self._names[item]

    def read(self, item: int, indices: np.ndarray, *, side: int) -> np.ndarray:
        info = self._infos[item]
        if info.kind == "image":
            image = media.middle(media.read_frames(info.path))
            return media.resize_shortest(image, side=side, name=info.path)
        return self._open(info.path).read_at(indices, side=side, longest=media.LONGEST)

    def _open(self, path: str) -> media.VideoReader:
        return self._videos.open(path, lambda: media.VideoReader(path))


def name_place(name: str) -> int:
    """Where `name` falls among all names, evenly spread over [0, 2^64)."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def held_out(place: np.ndarray, *, fraction: float) -> np.ndarray:
    """bool [n]: items kept from training, those whose original falls below `fraction`.

    That depends on the original's name alone, so adding files moves none, and all clips of one
    original fall on one side. The exception is a small data set where chance picks none or all
    originals: then that with the lowest hash is held out, or that with the highest is not.
    """
    chosen = place < np.uint64(min(fraction * 2.0**64, 2.0**64 - 2048))
    if len(place) and chosen.all():
        chosen &= place != place.max()
    if not chosen.any() and fraction > 0 and (place != place[:1]).any():
        chosen = place == place.min()
    return chosen


@dataclasses.dataclass(frozen=True)
class SourceSplit:
    """A source as the config asks for it in one split.

    Attributes:
      name: its key in `data.sources`; seed: a number of its own that follows from the name, so
        that adding another source leaves its order as it is.
      settings: its settings there.
      items: int64 [m], the items of `source` that belong to the split.
    """

    name: str
    seed: int
    source: Source
    settings: ml_collections.ConfigDict
    items: np.ndarray


@dataclasses.dataclass(frozen=True)
class SourceSplits:
    """The feeds of both splits, and what was left out of them.

    Attributes:
      damaged: one message a file that cannot be used.
      notes: what is lost of files that are used, one a kind of loss.
    """

    train: tuple[SourceSplit, ...]
    heldout: tuple[SourceSplit, ...]
    damaged: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def split(self, name: str) -> tuple[SourceSplit, ...]:
        return {"train": self.train, "heldout": self.heldout}[name]

    def fingerprint(self, split: str = "train") -> str:
        """16 hex digits: what decides which row of a split is what, but for the config."""
        feeds = self.split(split)
        listed = [(feed.name, feed.source.fingerprint, len(feed.items)) for feed in feeds]
        return hashlib.sha256(repr(listed).encode()).hexdigest()[:16]


def has_held_out(config: ml_collections.ConfigDict) -> bool:
    """Whether the config asks for data that is kept from training."""
    sources = [source for source in config.data.sources.values() if source.weight]
    return config.data.eval_fraction > 0 or any(
        source.path == "embedded" or source.heldout_split for source in sources
    )


def open_splits(config: ml_collections.ConfigDict) -> SourceSplits:
    """Opens all sources of a resolved config; files of raw folders are probed.

    Raises:
      UsageError: if a source is missing, has no item of the kind asked for, or has more damaged
        files than `data.max_bad_fraction` allows (named, with the mend).
    """
    train: list[SourceSplit] = []
    heldout: list[SourceSplit] = []
    damaged: list[str] = []
    notes: list[str] = []
    for name, settings in sorted(config.data.sources.items()):
        if not settings.weight:
            continue
        _require_sane_size(name, settings, side=config.video.resolution)
        source, apart = _open(settings, fraction=config.data.eval_fraction)
        bad = list(getattr(source, "damaged", ()))
        total = len(bad) + len(source.frames)
        if len(bad) > config.data.max_bad_fraction * total:
            raise UsageError(
                f"data source {name}: {len(bad)} of {total} files cannot be used, more than "
                f"data.max_bad_fraction = {config.data.max_bad_fraction:g} allows: "
                + "; ".join(bad[:3])
            )
        damaged += bad
        notes += [_loss_note(*loss) for loss in getattr(source, "losses", {}).items()]
        ignored = getattr(source, "ignored", {}) if settings.path != "embedded" else {}
        if ignored:
            notes.append(
                f"{settings.path}: not read, as no image or video: {ignored_text(ignored)}"
            )
        if isinstance(apart, np.ndarray):
            parts = [(train, source, ~apart), (heldout, source, apart)]
        else:
            everything = np.ones(len(apart.frames), bool)
            parts = [
                (train, source, np.ones(len(source.frames), bool)),
                (heldout, apart, everything),
            ]
        if not any(_of_kind(part, settings.kind).any() for _, part, _ in parts):
            raise UsageError(
                f"data source {name} ({settings.path}) has no {settings.kind}: change its kind or "
                f"path, or leave it out with --config.data.sources.{name}.weight=0"
            )
        for feeds, part, mask in parts:
            items = np.flatnonzero(mask & _of_kind(part, settings.kind))
            if len(items):
                feeds.append(SourceSplit(name, name_place(name), part, settings, items))
    return SourceSplits(tuple(train), tuple(heldout), tuple(damaged), tuple(notes))


def _require_sane_size(name: str, settings: ml_collections.ConfigDict, *, side: int) -> None:
    key = f"data.sources.{name}.resolution" if settings.resolution else "video.resolution"
    side = settings.resolution or side
    if side * side > media.LIMITS.pixels:
        raise UsageError(
            f"{key} = {side}: frames of {side}x{side} are more than {media.LIMITS.pixels} pixels: "
            "choose a smaller one"
        )


def _loss_note(loss: str, files: list[str]) -> str:
    more = f" and {len(files) - 1} other files" if len(files) > 1 else ""
    return f"{files[0]}{more}: {loss}" if more else f"{files[0]} {loss}"


def _of_kind(source: Source, kind: str) -> np.ndarray:
    if kind == "any":
        return np.ones(len(source.frames), bool)
    return source.is_video == (kind == "video")


def _open(
    settings: ml_collections.ConfigDict, *, fraction: float
) -> tuple[Source, "np.ndarray | Source"]:
    """A source, with a mask of its held-out items or another source that holds them."""
    path = input_path(settings.path)
    if has_scheme(path):
        raise UsageError(f"{path}: make a data set of it first: elastictok prepare {path} -o DIR")
    if path == "embedded":
        files = FileSource(EMBEDDED)
        names = [files.name(item) for item in range(len(files.frames))]
        return files, np.array([name.startswith("heldout/") for name in names])
    if path != "synthetic" and is_record_dataset(path):
        records = RecordSource(path, split=settings.split)
        if settings.heldout_split:
            return records, RecordSource(path, split=settings.heldout_split)
        return records, held_out(records.place, fraction=fraction)
    if settings.heldout_split:
        raise UsageError(f"{path} has no splits: heldout_split is for TFDS data sets")
    source: Source = SyntheticSource() if path == "synthetic" else FileSource(path)
    return source, held_out(source.place, fraction=fraction)
