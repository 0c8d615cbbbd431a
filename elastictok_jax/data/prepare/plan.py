"""Assigns the inputs of `elastictok prepare` to shards, identically on every machine."""

import dataclasses
import glob
import hashlib
import json
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

from elastictok_jax.data import media
from elastictok_jax.data.prepare.remote_files import open_remote_file_system
from elastictok_jax.data.prepare.transcode import TranscodeSettings
from elastictok_jax.data.sources.listing import list_media
from elastictok_jax.data.sources.tfds_records import PART_FRAMES, RecordSource, is_record_dataset
from elastictok_jax.errors import UsageError
from elastictok_jax.paths import expand_input_path, has_scheme, path_text

ITEMS_AT_ONCE = 256  # of a TFDS data set, in one entry
PLAN_VERSION = 2  # 1: color of stored video half a pixel too far right


@dataclasses.dataclass(frozen=True)
class Entry:
    """One original: a file, a URL, or items [start, stop) of a TFDS data set at `path`.

    Attributes:
      name: unique; relative to its input, so that it is the same wherever the input is.
      size: bytes, maybe estimated.
    """

    kind: str
    path: str
    name: str
    size: int
    start: int = 0
    stop: int = 0

    @property
    def originals(self) -> int:
        """Number of files or items."""
        return max(1, self.stop - self.start)


@dataclasses.dataclass(frozen=True)
class PreparePlan:
    """The entries of each shard, and all else that the result depends on.

    Attributes:
      unreadable: the reason for each file or folder that could not be listed.
      ignored: the number of files of each suffix that are neither images nor videos.
    """

    shards: list[list[Entry]]
    settings: TranscodeSettings
    shard_mib: float
    unreadable: dict[str, str] = dataclasses.field(default_factory=dict)
    ignored: Counter[str] = dataclasses.field(default_factory=Counter)

    def identity(self) -> dict[str, Any]:
        """Returns what must not change when a run resumes another."""
        entries = sorted((e.name, e.size) for shard in self.shards for e in shard)
        digest = hashlib.sha256(json.dumps(entries).encode()).hexdigest()
        options = dataclasses.asdict(self.settings)
        limits = options.pop("limits")
        return {
            "plan_version": PLAN_VERSION,
            "inputs": len(entries),
            "inputs_digest": digest,
            "part_frames": PART_FRAMES,
            "shard_mib": self.shard_mib,
            **options,
            **{f"max_{name}": value for name, value in limits.items()},
        }


def plan_prepare(
    inputs: list[str], *, settings: TranscodeSettings, shard_mib: float
) -> PreparePlan:
    """Lists `inputs` and assigns their originals to shards of about `shard_mib` MiB.

    Raises:
      UsageError: if an input is missing or empty, or two originals have one name.
    """
    plan = PreparePlan([], settings, shard_mib)
    entries = [entry for text in inputs for entry in _entries(text, plan, several=len(inputs) > 1)]
    if not entries:
        raise UsageError(f"no input can be read: {'; '.join(_reasons(plan)[:3])}")
    names: dict[str, str] = {}
    for entry in entries:
        if names.setdefault(entry.name, entry.path) != entry.path:
            raise UsageError(
                f"{names[entry.name]} and {entry.path} would both be called {entry.name}: give "
                "the folder above them, or rename one"
            )
    unique = {entry.name: entry for entry in entries}
    # By hash, so that each shard is a random sample.
    order = sorted(unique.values(), key=lambda e: hashlib.sha256(e.name.encode()).digest())
    total = sum(entry.size for entry in order)
    count = max(1, math.ceil(min(len(order), total / (shard_mib * 2**20))))
    plan.shards.extend(order[index::count] for index in range(count))
    return plan


def _reasons(plan: PreparePlan) -> list[str]:
    return [f"{name}: {reason}" for name, reason in sorted(plan.unreadable.items())]


def _entries(text: str, plan: PreparePlan, *, several: bool) -> list[Entry]:
    """Lists the entries of one input; records ignored and unreadable files in `plan`."""
    text = expand_input_path(text)
    if has_scheme(text):
        return _remote_entries(text, plan)
    if is_record_dataset(text):
        return _dataset_entries(Path(text))
    listing = list_media(text)
    plan.ignored.update(listing.ignored)
    plan.unreadable.update(listing.unreadable)
    is_one_file = os.path.isfile(text)
    folder = path_text(listing.root.resolve().name)
    prefix = f"{folder}/" if several and not is_one_file else ""
    return [
        Entry("file", os.fspath(file), prefix + listing.name(file), os.path.getsize(file))
        for file in listing.files
    ]


def _remote_entries(url: str, plan: PreparePlan) -> list[Entry]:
    system, path = open_remote_file_system(url)
    try:
        if glob.has_magic(path):
            found = system.glob(path, detail=True)
        else:
            found = system.find(path, detail=True)
    except Exception as error:  # each file system has its own errors
        raise UsageError(f"input {url} cannot be listed: {error}") from error
    suffixes = (
        media.IMAGE_SUFFIXES | media.VIDEO_SUFFIXES
    )  # contents are not known before a download
    shown = {
        name: info
        for name, info in found.items()
        if info.get("type") == "file" and not any(p.startswith(".") for p in Path(name).parts)
    }
    files = {name: info for name, info in shown.items() if Path(name).suffix.lower() in suffixes}
    plan.ignored.update(Path(name).suffix.lower() for name in shown.keys() - files.keys())
    if not files:
        raise UsageError(f"input {url} holds no image or video")
    parents = [os.path.dirname(name) for name in files]
    root = os.path.commonpath(parents)
    return [
        Entry("url", system.unstrip_protocol(name), os.path.relpath(name, root), info["size"] or 0)
        for name, info in sorted(files.items())
    ]


def _dataset_entries(path: Path) -> list[Entry]:
    source = RecordSource(path, split="train")
    items = len(source.frames)
    size = sum(file.stat().st_size for file in path.glob("*.array_record*"))
    return [
        Entry(
            "dataset",
            str(path),
            f"{path.resolve().name}/train/{start:09}",
            size * (min(start + ITEMS_AT_ONCE, items) - start) // items,
            start,
            min(start + ITEMS_AT_ONCE, items),
        )
        for start in range(0, items, ITEMS_AT_ONCE)
    ]
