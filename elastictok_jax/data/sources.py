"""Where clips come from: the embedded footage or a folder, in train and held-out splits."""

import dataclasses
import hashlib
from pathlib import Path

import ml_collections

from elastictok_jax.data import media
from elastictok_jax.errors import UsageError

SPLITS = ("train", "heldout")
EMBEDDED = Path(__file__).parent / "embedded"


@dataclasses.dataclass(frozen=True)
class Source:
    """The files of one split, in the order of their names."""

    images: tuple[media.MediaInfo, ...]
    videos: tuple[media.MediaInfo, ...]

    def fingerprint(self) -> str:
        """16 hex digits of the names and lengths of the files: what decides which row is what."""
        listed = [(Path(info.path).name, info.frames) for info in (*self.videos, *self.images)]
        return hashlib.sha256(repr(listed).encode()).hexdigest()[:16]


def list_media(folder: Path) -> list[Path]:
    """All image and video files below `folder`, sorted; hidden ones are left out.

    Raises:
      UsageError: if the folder is missing or holds none.
    """
    if not folder.is_dir():
        raise UsageError(f"data folder {folder} does not exist: give a folder, or embedded")
    suffixes = media.IMAGE_SUFFIXES | media.VIDEO_SUFFIXES
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in suffixes
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not files:
        raise UsageError(
            f"data folder {folder} holds no image or video: put files there that end in "
            + " ".join(sorted(suffixes))
        )
    return files


def held_out(names: list[str], *, fraction: float) -> set[str]:
    """Names that are kept from training: those whose hash falls below `fraction`.

    A file's split depends on its own name alone, so adding files moves none. The exception is a
    small folder where chance picks none: there the file with the lowest hash is held out.
    """

    def place(name: str) -> float:
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2.0**64

    chosen = {name for name in names if place(name) < fraction}
    if len(chosen) == len(names):
        chosen.discard(max(names, key=place))
    if not chosen and fraction > 0 and len(names) > 1:
        chosen = {min(names, key=place)}
    return chosen


def has_held_out(config: ml_collections.ConfigDict) -> bool:
    """Whether any file is kept from training."""
    return config.data.source == "embedded" or config.data.eval_fraction > 0


def open_source(config: ml_collections.ConfigDict, *, split: str) -> Source:
    """The "train" or "heldout" split of `config.data.source`; every file is probed.

    Raises:
      UsageError: if a file is damaged (named, with the mend), or there is nothing to train on.
    """
    if config.data.source == "embedded":
        files = list_media(EMBEDDED / split)
    else:
        folder = Path(config.data.source)
        files = list_media(folder)
        names = {path: path.relative_to(folder).as_posix() for path in files}
        apart = held_out(list(names.values()), fraction=config.data.eval_fraction)
        files = [path for path in files if (names[path] in apart) == (split == "heldout")]
    infos = [media.probe(path) for path in files]
    return Source(
        images=tuple(info for info in infos if info.kind == "image"),
        videos=tuple(info for info in infos if info.kind == "video"),
    )
