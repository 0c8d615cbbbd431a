"""Makes one shard of a prepared data set, in its own process; see `supervisor`."""

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
from elastictok_jax.data.prepare.remote_files import fetch_remote_file
from elastictok_jax.data.prepare.transcode import TranscodeSettings, transcode_file, transcode_item
from elastictok_jax.data.sources.base import name_hash
from elastictok_jax.data.sources.tfds_records import (
    WORK,
    RecordSource,
    RecordWriter,
    tfds_shard_name,
)

NO_ROOM = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
)  # errors of the output disk


def shard_sidecar_path(directory: Path, shard: int) -> Path:
    """Returns the path of a shard's index columns and skipped files, kept until the end."""
    return directory / WORK / f"shard-{shard:05}.json"


def is_shard_done(directory: Path, shard: int, shards: int) -> bool:
    """Returns whether a shard is complete."""
    return (directory / tfds_shard_name(shard, shards)).exists() and shard_sidecar_path(
        directory, shard
    ).exists()


def work_on_shard(
    *,
    directory: str,
    shard: int,
    shards: int,
    entries: list[Entry],
    settings: TranscodeSettings,
    hopeless: dict[str, str],
    pipe,
) -> None:
    """Makes a shard, as the main function of a process, and reports progress to `pipe`.

    Sends ("original", name) before each original, ("writing", None) after the last, ("done", None)
    at the end and ("error", reason) if it cannot write. Originals in `hopeless` are skipped with
    the reason given there.
    """
    parent = os.getppid()

    def tell(kind: str, value: str | None) -> None:
        if os.getppid() != parent:
            os._exit(1)  # the parent was killed; another run may be active
        pipe.send((kind, value))

    try:
        _make_shard(Path(directory), shard, shards, entries, settings, hopeless=hopeless, tell=tell)
        tell("done", None)
    except OSError as error:  # most likely a full disk; bad originals raise MediaError
        tell("error", error.strerror or str(error))


def _make_shard(
    directory: Path,
    shard: int,
    shards: int,
    entries: list[Entry],
    settings: TranscodeSettings,
    *,
    hopeless: dict[str, str],
    tell: Callable[[str, str | None], None],
) -> None:
    """Writes a shard and its sidecar, each atomically, the shard last.

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
                # Read to its end before anything is written: the last frame may be damaged.
                try:
                    if name in hopeless:
                        raise MediaError(hopeless[name])
                    records, loss = make()
                except MediaError as error:
                    skipped.append({"file": name, "reason": _without_path(error, entry, name)})
                    continue
                for record in records:
                    writer.write(record, place=name_hash(record["source"]))
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
        os.replace(text, shard_sidecar_path(directory, shard))
        os.replace(path, directory / tfds_shard_name(shard, shards))


def _originals(entry: Entry, settings: TranscodeSettings, temporary: Path):
    """Yields (name, function that makes the records) of each original in an entry."""
    if entry.kind == "file":
        yield (
            entry.name,
            lambda: transcode_file(Path(entry.path), name=entry.name, settings=settings),
        )
    elif entry.kind == "url":
        yield entry.name, lambda: _remote_records(entry, settings, temporary)
    else:
        source = RecordSource(entry.path, split="train")
        for item in range(entry.start, entry.stop):
            name = source.name(item)
            yield (
                name,
                lambda item=item, name=name: transcode_item(
                    source, item, name=name, settings=settings
                ),
            )


def _remote_records(
    entry: Entry, settings: TranscodeSettings, temporary: Path
) -> tuple[list[dict[str, Any]], str]:
    digest = hashlib.sha256(entry.name.encode()).hexdigest()[:16]
    local = temporary / (digest + Path(entry.name).suffix)
    try:
        try:
            fetch_remote_file(entry.path, local)
        except OSError as error:
            if error.errno in NO_ROOM:
                raise
            raise MediaError(f"{entry.path}: cannot be fetched ({error})") from error
        return transcode_file(local, name=entry.name, settings=settings)
    finally:
        local.unlink(missing_ok=True)


def _without_path(error: MediaError, entry: Entry, name: str) -> str:
    """Returns the reason without the path: the same wherever the input is."""
    reason = str(error)
    for path in (entry.path, name):
        reason = reason.removeprefix(f"{path}: ")
    return reason


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
