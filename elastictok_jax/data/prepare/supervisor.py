"""Makes a data set of records from originals of any kind; see `tfds_records`.

Originals are assigned to shards; each shard is made by one process under a temporary name and
renamed when complete. So a run killed at any moment resumes, several machines can share one folder,
and the result depends on the inputs and options alone.
"""

import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from elastictok_jax.ctrl_c import keep_ctrl_c_from_children
from elastictok_jax.data.prepare.plan import PreparePlan, plan_prepare
from elastictok_jax.data.prepare.shard import is_shard_done, shard_sidecar_path, work_on_shard
from elastictok_jax.data.prepare.transcode import TranscodeSettings
from elastictok_jax.data.sources.listing import listing_ignored_text
from elastictok_jax.data.sources.tfds_records import INDEX_COLUMNS, WORK, write_tfds_metadata
from elastictok_jax.errors import RunError, UsageError
from elastictok_jax.storage.atomic import write_json

REPORT = "report.json"
DONE = ".prepared"  # the working folder, while it is removed
LOOK_SECONDS = 0.5  # between checks of the processes


def prepare_data_set(
    inputs: list[str],
    *,
    output: Path,
    settings: TranscodeSettings,
    jobs: int,
    machine: tuple[int, int] = (0, 1),
    shard_mib: float = 256,
    timeout: float = 3600.0,
) -> dict[str, Any]:
    """Makes the missing shards of the data set in `output`.

    Returns the content of its report.json, or {"shards_done", "shards"} while other machines have
    shards to make.

    Args:
      jobs: number of processes.
      machine: (i, n): makes only the shards k with k % n == i.
      timeout: seconds after which an original is skipped.

    Raises:
      UsageError: if an input is wrong, or `output` holds something else.
      RunError: if `output` cannot be written; complete shards are kept.
    """
    plan = plan_prepare(inputs, settings=settings, shard_mib=shard_mib)
    report = _report_if_complete(output, plan)
    if report:
        print(f"{output} is complete: nothing to do", file=sys.stderr)
        return report
    _begin(output, plan)
    shards = len(plan.shards)
    index, machines = machine
    mine = [k for k in range(index, shards, machines) if not is_shard_done(output, k, shards)]
    try:
        _Supervisor(output, plan, mine, jobs=jobs, timeout=timeout).run()
        done = sum(is_shard_done(output, k, shards) for k in range(shards))
        if done == shards:
            return _finish(output, plan)
    except (OSError, RunError) as error:
        report = _report_if_complete(output, plan)  # another machine completed it first
        if report:
            return report
        if isinstance(error, RunError):
            raise
        raise RunError(
            f"{output} cannot be written ({_reason(error)}): complete shards are kept; fix that "
            "and run the same command again"
        ) from error
    report = _report_if_complete(output, plan)
    if report:
        return report
    print(
        f"{done} of {shards} shards are done; the data set is complete when the other machines "
        "have made theirs",
        file=sys.stderr,
    )
    return {"shards_done": done, "shards": shards}


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _report_if_complete(output: Path, plan: PreparePlan) -> dict[str, Any] | None:
    """Returns the report of a complete data set in `output`, else None.

    Raises:
      UsageError: if it is of another plan.
    """
    if (output / WORK).exists() or not (output / "dataset_info.json").is_file():
        return None
    report = _read_json(output / REPORT)
    _compare(output, report.get("plan", {}), plan)
    shutil.rmtree(output / DONE, ignore_errors=True)
    return report


def _begin(output: Path, plan: PreparePlan) -> None:
    """Makes the working folder, or checks that the one in `output` is of the same plan."""
    path = output / WORK / "plan.json"
    if path.exists():
        _compare(output, _read_json(path), plan)
        return
    if output.is_dir() and any(entry.name != WORK for entry in output.iterdir()):
        raise UsageError(f"{output} holds other files: give a new folder as -o")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{output} cannot be written ({_reason(error)}): choose another -o"
        ) from None
    write_json(path, plan.identity())


def _compare(output: Path, before: dict[str, Any], plan: PreparePlan) -> None:
    now = plan.identity()
    differ = [
        f"{key} {before.get(key)!r} -> {value!r}"
        for key, value in now.items()
        if before.get(key) != value
    ]
    if differ:
        raise UsageError(
            f"{output} holds a data set of other inputs or options ({', '.join(differ)}): give the "
            "same, or another -o"
        )


class _Supervisor:
    """Runs up to `jobs` processes, one per shard.

    If one hangs, or dies twice at the same original, its shard is made again without it.
    """

    def __init__(
        self, output: Path, plan: PreparePlan, waiting: list[int], *, jobs: int, timeout: float
    ):
        self._output, self._plan, self._waiting = output, plan, waiting[::-1]
        self._jobs, self._timeout = jobs, timeout
        self._context = multiprocessing.get_context("spawn")
        self._running: dict[int, _Job] = {}
        self._crashed: set[str] = set()  # originals at which a process died once
        originals = sum(entry.originals for shard in waiting for entry in plan.shards[shard])
        self._bar = tqdm(
            total=originals, unit="file", disable=not sys.stderr.isatty(), dynamic_ncols=True
        )

    def run(self) -> None:
        """Makes the shards.

        Raises:
          OSError, RunError: if a process or this one cannot write.
          RunError: if a process dies between originals.
        """
        try:
            while self._waiting or self._running:
                while self._waiting and len(self._running) < self._jobs:
                    self._start(self._waiting.pop())
                pipes = [job.pipe for job in self._running.values()]
                multiprocessing.connection.wait(pipes, timeout=LOOK_SECONDS)
                for shard, job in list(self._running.items()):
                    self._look(shard, job)
        finally:
            for job in self._running.values():
                job.process.kill()
                job.process.join()
            self._bar.close()

    def _start(self, shard: int) -> None:
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(
            target=work_on_shard,
            kwargs=dict(
                directory=str(self._output),
                shard=shard,
                shards=len(self._plan.shards),
                entries=self._plan.shards[shard],
                settings=self._plan.settings,
                hopeless=self._hopeless(shard),
                pipe=theirs,
            ),
            daemon=True,
        )
        with keep_ctrl_c_from_children():
            process.start()
        theirs.close()
        self._running[shard] = _Job(process, ours)

    def _look(self, shard: int, job: "_Job") -> None:
        try:
            while job.pipe.poll():
                kind, value = job.pipe.recv()
                if kind == "error":
                    raise OSError(value)
                self._bar.update(job.original is not None)
                job.finished = kind == "done"
                job.original, job.since = value, time.monotonic()
        except EOFError:
            job.ended = True
        if job.finished:
            job.process.join()
            del self._running[shard]
            self._say(f"shard {shard + 1} of {len(self._plan.shards)} is done")
        elif job.ended:
            job.process.join()
            reason = f"crashed its process (exit code {job.process.exitcode})"
            if job.original is None or job.original in self._crashed:
                self._give_up(shard, job, reason)
            else:
                del self._running[shard]
                self._crashed.add(job.original)
                self._say(f"{job.original}: {reason}; making its shard again")
                self._waiting.append(shard)
        elif job.original is not None and time.monotonic() - job.since > self._timeout:
            job.process.kill()
            job.process.join()
            self._give_up(shard, job, f"took longer than {self._timeout:g} seconds")

    def _give_up(self, shard: int, job: "_Job", reason: str) -> None:
        del self._running[shard]
        hopeless = self._hopeless(shard)
        if job.original is None or job.original in hopeless:  # not because of what it read
            raise RunError(
                f"shard {shard} {reason} while it read no original: see the "
                "messages above; complete shards are kept"
            )
        write_json(self._hopeless_path(shard), hopeless | {job.original: reason})
        self._say(f"{job.original}: {reason}; making its shard again without it")
        self._waiting.append(shard)

    def _hopeless_path(self, shard: int) -> Path:
        return self._output / WORK / f"hopeless-{shard:05}.json"

    def _hopeless(self, shard: int) -> dict[str, str]:
        path = self._hopeless_path(shard)
        return _read_json(path) if path.exists() else {}

    def _say(self, text: str) -> None:
        if self._bar.disable:
            print(text, file=sys.stderr, flush=True)
        else:
            self._bar.write(text, file=sys.stderr)


class _Job:
    def __init__(self, process, pipe) -> None:
        self.process, self.pipe = process, pipe
        self.original: str | None = None  # being read
        self.since, self.finished, self.ended = 0.0, False, False


def _finish(output: Path, plan: PreparePlan) -> dict[str, Any]:
    """Writes metadata, index and report, and removes the working folder.

    Safe to call twice, or on two machines at once.

    Raises:
      OSError: if a file cannot be written.
    """
    sidecars = [_read_json(shard_sidecar_path(output, shard)) for shard in range(len(plan.shards))]
    columns = {
        name: [v for sidecar in sidecars for v in sidecar["columns"][name]]
        for name in INDEX_COLUMNS
    }
    lengths = [len(sidecar["columns"]["part"]) for sidecar in sidecars]
    num_bytes = sum(sidecar["bytes"] for sidecar in sidecars)
    skipped, lossy = (
        sorted((s for c in sidecars for s in c[key]), key=lambda s: s["file"])
        for key in ("skipped", "lossy")
    )
    skipped += [{"file": name, "reason": why} for name, why in sorted(plan.unreadable.items())]
    if not sum(lengths):
        reasons = "; ".join(f"{s['file']}: {s['reason']}" for s in skipped[:3])
        raise UsageError(f"no input can be used: {reasons}")
    by_hash = defaultdict(list)
    for sidecar in sidecars:
        for name, digest in sidecar["hashes"]:
            by_hash[digest].append(name)
    is_video, part = np.array(columns["is_video"], bool), np.array(columns["part"])
    frames, fps = np.array(columns["frames"]), np.array(columns["fps"])
    report = {
        "plan": plan.identity(),
        "images": int((~is_video).sum()),
        "video_clips": int((is_video & (part == 0)).sum()),
        "video_records": int(is_video.sum()),
        "video_frames": int(frames[is_video].sum()),
        "video_hours": float((frames[is_video] / fps[is_video]).sum() / 3600),
        "shards": len(plan.shards),
        "bytes_in": sum(sidecar["bytes_in"] for sidecar in sidecars),
        "bytes_out": num_bytes,
        "duplicates": sorted(sorted(names) for names in by_hash.values() if len(names) > 1),
        "skipped": skipped,
        "ignored": dict(sorted(plan.ignored.items())),
        "lossy": lossy,
    }
    with tempfile.TemporaryDirectory(prefix="tmp-end-", dir=output / WORK) as temporary:
        made = Path(temporary)
        (made / REPORT).write_text(json.dumps(report, indent=2) + "\n")
        write_tfds_metadata(made, shard_lengths=lengths, num_bytes=num_bytes, columns=columns)
        for path in sorted(made.iterdir()):
            os.replace(path, output / path.name)
    # Complete once the folder is gone: one rename, however long removing its files takes.
    os.replace(output / WORK, output / DONE)
    shutil.rmtree(output / DONE, ignore_errors=True)
    return report


def prepare_data_set_summary(report: dict[str, Any]) -> str:
    """Formats the report as a few lines."""
    ignored = report["ignored"]
    lines = [
        f"{report['images']} images and {report['video_clips']} video clips "
        f"({report['video_frames']} frames, {report['video_hours']:.3g} hours) in "
        f"{report['shards']} shards: {report['bytes_in'] / 2**20:.1f} MiB became "
        f"{report['bytes_out'] / 2**20:.1f} MiB",
        *(f"duplicates: {', '.join(names)}" for names in report["duplicates"]),
        f"skipped: {len(report['skipped'])} files",
        *(f"  {entry['file']}: {entry['reason']}" for entry in report["skipped"]),
        *([f"not read, as no image or video: {listing_ignored_text(ignored)}"] if ignored else []),
        *(f"note: {entry['file']} {entry['loss']}" for entry in report["lossy"]),
    ]
    return "\n".join(lines)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UsageError(f"{path} is damaged ({error}): prepare into another folder") from None
