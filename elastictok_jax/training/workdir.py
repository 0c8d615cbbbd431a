"""Makes and checks the folder of a run, which must be the same one in all processes."""

import json
import time
import uuid
from pathlib import Path
from typing import Any

import ml_collections

from elastictok_jax.config import config_to_json, flatten_config, read_config
from elastictok_jax.errors import UsageError
from elastictok_jax.parallel.distributed import FIRST_SECONDS, broadcast_from_first, process_place
from elastictok_jax.storage.atomic import replacing
from elastictok_jax.storage.checkpoint import saved_steps

# Config keys that must not change when a run resumes; `compute`, the mesh and the rest may.
FIXED_ON_RESUME = ("model.", "video.")
HELD_OUT = "held_out.json"
SHARED_SECONDS = 30.0  # for a network file system to show a new file


def enter_workdir(workdir: Path, config: ml_collections.ConfigDict, *, files: Any) -> None:
    """Makes `workdir`, and checks that all processes train the same run in it on the same `files`.

    Raises:
      UsageError: if it cannot be written, has checkpoints of another model, or is not the folder
        of process 0; or if config or data files differ from those of process 0.
    """
    process, processes = process_place()
    if process == 0:
        _prepare_workdir(workdir, config)
    if processes == 1:
        return
    mark = workdir / "run_id"  # new at every start
    mine = {"config": flatten_config(config), "files": files, "run_id": uuid.uuid4().hex}
    if process == 0:
        mark.write_text(mine["run_id"])
    mine = json.loads(json.dumps(mine))
    first = json.loads(broadcast_from_first("run", json.dumps(mine), timeout=FIRST_SECONDS))
    theirs = first["config"]
    differ = [
        f"{key} {theirs.get(key)!r} there, {mine['config'].get(key)!r} here"
        for key in sorted(theirs.keys() | mine["config"].keys())
        if theirs.get(key) != mine["config"].get(key)
    ]
    if differ:
        raise UsageError(
            f"process {process} has another config than process 0: {', '.join(differ)}. Give all "
            "processes the same command"
        )
    if first["files"] != mine["files"]:
        raise UsageError(
            f"process {process} sees other data files than process 0: give all processes the same "
            "data sets, on shared storage or as complete copies"
        )
    deadline = time.monotonic() + SHARED_SECONDS
    while not (mark.exists() and mark.read_text() == first["run_id"]):
        if time.monotonic() > deadline:
            raise UsageError(
                f"workdir {workdir} of process {process} is not that of process 0: give a folder "
                "on storage that all processes share"
            )
        time.sleep(0.2)


def _prepare_workdir(workdir: Path, config: ml_collections.ConfigDict) -> None:
    """Makes `workdir` and checks that it can be written.

    Raises:
      UsageError: if it cannot be written, or has checkpoints of another model.
    """
    path = workdir / "config.json"
    if path.exists():
        old, new = flatten_config(read_config(path)), flatten_config(config)
        changed = [
            f"{key} {old.get(key)!r} -> {new[key]!r}"
            for key in sorted(new)
            if key.startswith(FIXED_ON_RESUME) and old.get(key) != new[key]
        ]
        if changed and any((workdir / "checkpoints").glob("[0-9]*")):
            raise UsageError(
                f"workdir {workdir} holds a run with another model: {', '.join(changed)}. "
                "Use its config, or another --workdir"
            )
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_workdir_config(workdir, config)
        with path.open("a"):
            pass
    except OSError as error:
        raise UsageError(
            f"workdir {workdir} cannot be written ({error.strerror}): choose a writable --workdir"
        ) from None


def write_workdir_config(workdir: Path, config: ml_collections.ConfigDict) -> None:
    """Writes config.json atomically, in process 0 only."""
    if process_place()[0] == 0:
        with replacing(workdir / "config.json") as temporary:
            temporary.write_text(config_to_json(config))


def write_workdir_held_out(workdir: Path, fingerprint: str) -> None:
    """Records the data that a run is evaluated on, for `elastictok compare`; in process 0 only."""
    if process_place()[0] == 0:
        with replacing(workdir / HELD_OUT) as temporary:
            temporary.write_text(json.dumps({"files": fingerprint}) + "\n")


def read_workdir_held_out(workdir: Path) -> str | None:
    """Returns what `write_workdir_held_out` recorded, or None if there is no record."""
    try:
        return str(json.loads((workdir / HELD_OUT).read_text())["files"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def newest_saved_in_workdir(workdir: Path) -> str:
    """Returns a sentence on the newest complete checkpoint on disk and how to resume from it."""
    steps = saved_steps(workdir / "checkpoints")
    saved = f"Step {steps[0]} is the newest saved" if steps else "No step is saved yet"
    return f"{saved} in {workdir}: run the same command again in every process to go on from it"
