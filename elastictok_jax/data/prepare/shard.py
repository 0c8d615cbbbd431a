"""One shard of a prepared data set, made in a process of its own. See `prepare`."""

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from elastictok_jax.data.media import MediaError
from elastictok_jax.data.prepare.plan import Entry
from elastictok_jax.data.prepare.transcode import Settings, fetch, file_records, item_records
from elastictok_jax.data.sources.splits import name_place
from elastictok_jax.data.sources.tfds_records import WORK, RecordSource, RecordWriter, shard_name

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})  # of our own disk


def sidecar_path(directory: Path, shard: int) -> Path:
    """Where the index columns and skipped files of a shard are kept until the end."""
    return directory / WORK / f"shard-{shard:05}.json"


def is_done(directory: Path, shard: int, shards: int) -> bool:
    """Whether a shard is there, whole."""
    return (directory / shard_name(shard, shards)).exists() and sidecar_path(
        directory, shard
    ).exists()


def work_on_shard(
    *,
    directory: str,
    shard: int,
    shards: int,
    entries: list[Entry],
    settings: Settings,
    hopeless: dict[str, str],
    pipe,
) -> None:
    """The process: makes the shard, and says into `pipe` which original it reads.

    Sends ("original", name) before each, ("writing", None) after the last, ("done", None) at the
    end and ("error", reason) where it cannot write. Originals in `hopeless` are skipped for the
    reason given there.
    """
    parent = os.getppid()

    def tell(kind: str, value: str | None) -> None:
        if os.getppid() != parent:
            os._exit(1)  # what had started this was killed; another run may be at work
        pipe.send((kind, value))

    try:
        make_shard(Path(directory), shard, shards, entries, settings, hopeless=hopeless, tell=tell)
        tell("done", None)
    except OSError as error:  # a full disk, most likely: what is wrong with originals is MediaError
        tell("error", error.strerror or str(error))


def make_shard(
    directory: Path,
    shard: int,
    shards: int,
    entries: list[Entry],
    settings: Settings,
    *,
    hopeless: dict[str, str],
    tell: Callable[[str, str | None], None],
) -> None:
    """Writes a shard and its sidecar, each whole or not at all, the shard last.

    Raises:
      OSError: if they cannot be written.
    """
    work = directory / WORK
    skipped: list[dict[str, str]] = []
    lossy: list[dict[str, str]] = []
    hashes: list[list[str]] = []
    with tempfile.TemporaryDirectory(prefix=f"tmp-{shard:05}-", dir=work) as temporary:
        path = Path(temporary) / "shard"
        writer = RecordWriter(path)
        bytes_in = 0
        for entry in entries:
            for name, make in _originals(entry, settings, Path(temporary)):
                tell("original", name)
                # Read to its end before any of it is written: damage may be in the last frame.
                try:
                    if name in hopeless:
                        raise MediaError(hopeless[name])
                    records, loss = make()
                except MediaError as error:
                    skipped.append({"file": name, "reason": _without_path(error, entry, name)})
                    continue
                for record in records:
                    writer.write(record, place=name_place(record["source"]))
                hashes.append([name, records[0]["content_hash"]])
                if loss:
                    lossy.append({"file": name, "loss": loss})
            bytes_in += entry.size
        tell("writing", None)
        writer.close()
        sidecar = {
            "columns": {key: [_plain(v) for v in value] for key, value in writer.columns.items()},
            "bytes": writer.bytes,
            "bytes_in": bytes_in,
            "skipped": skipped,
            "lossy": lossy,
            "hashes": hashes,
        }
        text = Path(temporary) / "sidecar"
        text.write_text(json.dumps(sidecar))
        os.replace(text, sidecar_path(directory, shard))
        os.replace(path, directory / shard_name(shard, shards))


def _originals(entry: Entry, settings: Settings, temporary: Path):
    """(name, function that makes the records) of all that an entry holds."""
    if entry.kind == "file":
        yield (
            entry.name,
            lambda: file_records(Path(entry.path), name=entry.name, settings=settings),
        )
    elif entry.kind == "url":
        yield entry.name, lambda: _remote_records(entry, settings, temporary)
    else:
        source = RecordSource(entry.path, split="train")
        for item in range(entry.start, entry.stop):
            name = source.name(item)
            yield (
                name,
                lambda item=item, name=name: item_records(
                    source, item, name=name, settings=settings
                ),
            )


def _remote_records(
    entry: Entry, settings: Settings, temporary: Path
) -> tuple[list[dict[str, Any]], str]:
    digest = hashlib.sha256(entry.name.encode()).hexdigest()[:16]
    local = temporary / (digest + Path(entry.name).suffix)
    try:
        try:
            fetch(entry.path, local)
        except OSError as error:
            if error.errno in NO_ROOM:
                raise
            raise MediaError(f"{entry.path}: cannot be fetched ({error})") from error
        return file_records(local, name=entry.name, settings=settings)
    finally:
        local.unlink(missing_ok=True)


def _without_path(error: MediaError, entry: Entry, name: str) -> str:
    """The reason alone: the same wherever the input lies."""
    reason = str(error)
    for path in (entry.path, name):
        reason = reason.removeprefix(f"{path}: ")
    return reason


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
