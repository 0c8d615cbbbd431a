"""Opens the data sources of a config and splits them into train and held-out items."""

import dataclasses
import hashlib

import ml_collections
import numpy as np

from elastictok_jax.data import media
from elastictok_jax.data.sources.base import Source, name_hash
from elastictok_jax.data.sources.file_source import EMBEDDED, FileSource
from elastictok_jax.data.sources.held_out import held_out_items
from elastictok_jax.data.sources.listing import listing_ignored_text
from elastictok_jax.data.sources.synthetic import SyntheticSource
from elastictok_jax.data.sources.tfds_records import RecordSource, is_record_dataset
from elastictok_jax.errors import UsageError
from elastictok_jax.paths import expand_input_path, has_scheme

SPLITS = ("train", "heldout")


@dataclasses.dataclass(frozen=True)
class SourceSplit:
    """The items of a source in one split.

    Attributes:
      name: its key in `data.sources`; seed: a hash of the name, so that adding another source
        does not change its order.
      settings: its section of `data.sources`.
      items: int64 [m], the items of `source` in the split.
    """

    name: str
    seed: int
    source: Source
    settings: ml_collections.ConfigDict
    items: np.ndarray


@dataclasses.dataclass(frozen=True)
class SourceSplits:
    """The sources of both splits.

    Attributes:
      damaged: one message per file that cannot be used.
      notes: what is lost of files that are used, one per kind of loss.
    """

    train: tuple[SourceSplit, ...]
    heldout: tuple[SourceSplit, ...]
    damaged: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def split(self, name: str) -> tuple[SourceSplit, ...]:
        """Returns the sources of split `name`, one of SPLITS."""
        return {"train": self.train, "heldout": self.heldout}[name]

    def fingerprint(self, split: str = "train") -> str:
        """Returns 16 hex digits that, with the config, identify every row of a split."""
        feeds = self.split(split)
        listed = [(feed.name, feed.source.fingerprint, len(feed.items)) for feed in feeds]
        return hashlib.sha256(repr(listed).encode()).hexdigest()[:16]


def open_splits(config: ml_collections.ConfigDict) -> SourceSplits:
    """Opens all sources of a resolved config; files of raw folders are probed.

    Raises:
      UsageError: if a source is missing, has no item of the requested kind, or has more damaged
        files than `data.max_bad_fraction` allows; it names the fix.
    """
    train: list[SourceSplit] = []
    heldout: list[SourceSplit] = []
    damaged: list[str] = []
    notes: list[str] = []
    for name, settings in sorted(config.data.sources.items()):
        if not settings.weight:
            continue
        _require_sane_size(name, settings, side=config.video.resolution)
        source, held = _open(settings, fraction=config.data.eval_fraction)
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
                f"{settings.path}: not read, as no image or video: {listing_ignored_text(ignored)}"
            )
        if isinstance(held, np.ndarray):
            parts = [(train, source, ~held), (heldout, source, held)]
        else:
            everything = np.ones(len(held.frames), bool)
            parts = [
                (train, source, np.ones(len(source.frames), bool)),
                (heldout, held, everything),
            ]
        if not any(_of_kind(part, settings.kind).any() for _, part, _ in parts):
            raise UsageError(
                f"data source {name} ({settings.path}) has no {settings.kind}: change its kind or "
                f"path, or leave it out with --config.data.sources.{name}.weight=0"
            )
        for feeds, part, mask in parts:
            items = np.flatnonzero(mask & _of_kind(part, settings.kind))
            if len(items):
                feeds.append(SourceSplit(name, name_hash(name), part, settings, items))
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
    """Opens a source; returns it with a mask of its held-out items or a source of them."""
    path = expand_input_path(settings.path)
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
        return records, held_out_items(records.place, fraction=fraction)
    if settings.heldout_split:
        raise UsageError(f"{path} has no splits: heldout_split is for TFDS data sets")
    source: Source = SyntheticSource() if path == "synthetic" else FileSource(path)
    return source, held_out_items(source.place, fraction=fraction)
