"""`elastictok prepare`: originals of any kind to a data set of records; see `records`.

Originals are dealt to shards; each shard is made by one process under a temporary name and renamed
when whole. So a run killed at any moment goes on where it was, several machines can share one
folder, and the result depends on the inputs and options alone.
"""

import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from elastictok_jax.data.prepare_plan import Plan, make_plan
from elastictok_jax.data.prepare_shard import is_done, sidecar_path, work_on_shard
from elastictok_jax.data.records import INDEX_COLUMNS, WORK, write_metadata
from elastictok_jax.data.transcode import Settings
from elastictok_jax.errors import RunError, UsageError

REPORT = "report.json"
LOOK_SECONDS = 0.5  # between looks at how the processes do


def prepare(
    inputs: list[str],
    *,
    output: Path,
    settings: Settings,
    jobs: int,
    machine: tuple[int, int] = (0, 1),
    shard_mib: float = 256,
    timeout: float = 3600.0,
) -> dict[str, Any]:
    """Makes what is missing of the data set in `output`; returns the content of its report.json,
    or, while other machines have shards to make, {"shards_done", "shards"}.

    Args:
      jobs: processes at once.
      machine: (i, n): makes only the shards k with k % n == i.
      timeout: seconds that one original may take; then it is skipped.

    Raises:
      UsageError: if an input is wrong, or `output` holds something else.
      RunError: if `output` cannot be written any more; what is done is kept.
    """
    plan = make_plan(inputs, settings=settings, shard_mib=shard_mib)
    identity = plan.identity()
    finished = _begin(output, identity)
    if finished:
        print(f"{output} is complete: nothing to do", file=sys.stderr)
        return finished
    shards = len(plan.shards)
    index, machines = machine
    mine = [k for k in range(index, shards, machines) if not is_done(output, k, shards)]
    _Supervisor(output, plan, mine, jobs=jobs, timeout=timeout).run()
    done = sum(is_done(output, k, shards) for k in range(shards))
    if done < shards:
        print(
            f"{done} of {shards} shards are done; the data set is complete when the other "
            "machines have made theirs",
            file=sys.stderr,
        )
        return {"shards_done": done, "shards": shards}
    return _finish(output, plan, identity)


def _begin(output: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Sees that `output` is new or of the same plan; its report if it is complete."""
    work = output / WORK
    complete = (output / "dataset_info.json").is_file() and not work.exists()
    path = output / REPORT if complete else work / "plan.json"
    if path.exists():
        old = json.loads(path.read_text())
        before = old["plan"] if complete else old
        differ = [
            f"{key} {before.get(key)!r} -> {identity[key]!r}"
            for key in identity
            if before.get(key) != identity[key]
        ]
        if differ:
            raise UsageError(
                f"{output} holds a data set of other inputs or options ({', '.join(differ)}): give "
                "the same, or another -o"
            )
        return old if complete else None
    if output.is_dir() and any(entry.name != WORK for entry in output.iterdir()):
        raise UsageError(f"{output} holds other files: give a new folder as -o")
    try:
        work.mkdir(parents=True, exist_ok=True)
        _write_json(path, identity)
    except OSError as error:
        raise UsageError(
            f"{output} cannot be written ({error.strerror}): choose another -o"
        ) from None
    return None


class _Supervisor:
    """Runs up to `jobs` processes, one a shard; one that dies or hangs costs only the original
    that it was at: the shard is made again without it."""

    def __init__(self, output: Path, plan: Plan, waiting: list[int], *, jobs: int, timeout: float):
        self._output, self._plan, self._waiting = output, plan, waiting[::-1]
        self._jobs, self._timeout = jobs, timeout
        self._context = multiprocessing.get_context("spawn")
        self._running: dict[int, _Job] = {}
        entries = sum(len(plan.shards[shard]) for shard in waiting)
        self._bar = tqdm(
            total=entries, unit="file", disable=not sys.stderr.isatty(), dynamic_ncols=True
        )

    def run(self) -> None:
        try:
            while self._waiting or self._running:
                while self._waiting and len(self._running) < self._jobs:
                    self._start(self._waiting.pop())
                pipes = [job.pipe for job in self._running.values()]
                multiprocessing.connection.wait(pipes, timeout=LOOK_SECONDS)
                for shard, job in list(self._running.items()):
                    self._look(shard, job)
        except KeyboardInterrupt:
            raise RunError(
                "interrupted: whole shards are kept; run the same command to go on"
            ) from None
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
        process.start()
        theirs.close()
        self._running[shard] = _Job(process, ours)

    def _look(self, shard: int, job: "_Job") -> None:
        try:
            while job.pipe.poll():
                kind, value = job.pipe.recv()
                if kind == "error":
                    raise RunError(
                        f"{value}: whole shards are kept; mend that and run the same command again"
                    )
                job.finished = kind == "done"
                if kind == "entry":
                    self._bar.update(job.entry is not None)
                    job.entry, job.since = value, time.monotonic()
        except EOFError:
            job.ended = True
        if job.finished:
            job.process.join()
            self._bar.update()
            del self._running[shard]
            self._say(f"shard {shard + 1} of {len(self._plan.shards)} is done")
        elif job.ended:
            job.process.join()
            self._give_up(shard, job, f"crashed its process (exit code {job.process.exitcode})")
        elif job.entry is not None and time.monotonic() - job.since > self._timeout:
            job.process.kill()
            job.process.join()
            self._give_up(shard, job, f"took longer than {self._timeout:g} seconds")

    def _give_up(self, shard: int, job: "_Job", reason: str) -> None:
        del self._running[shard]
        if job.entry is None:
            raise RunError(
                f"a process {reason} before it began: see the messages above; whole shards are kept"
            )
        hopeless = self._hopeless(shard) | {job.entry: reason}
        _write_json(self._hopeless_path(shard), hopeless)
        self._say(f"{job.entry}: {reason}; making its shard again without it")
        self._waiting.append(shard)

    def _hopeless_path(self, shard: int) -> Path:
        return self._output / WORK / f"hopeless-{shard:05}.json"

    def _hopeless(self, shard: int) -> dict[str, str]:
        path = self._hopeless_path(shard)
        return json.loads(path.read_text()) if path.exists() else {}

    def _say(self, text: str) -> None:
        if self._bar.disable:
            print(text, file=sys.stderr, flush=True)
        else:
            self._bar.write(text, file=sys.stderr)


class _Job:
    def __init__(self, process, pipe) -> None:
        self.process, self.pipe = process, pipe
        self.entry: str | None = None
        self.since, self.finished, self.ended = 0.0, False, False


def _finish(output: Path, plan: Plan, identity: dict[str, Any]) -> dict[str, Any]:
    """Writes metadata, index and report, and removes the working folder. Safe to do twice."""
    sidecars = [
        json.loads(sidecar_path(output, shard).read_text()) for shard in range(len(plan.shards))
    ]
    columns = {
        name: [v for sidecar in sidecars for v in sidecar["columns"][name]]
        for name in INDEX_COLUMNS
    }
    lengths = [len(sidecar["columns"]["part"]) for sidecar in sidecars]
    num_bytes = sum(sidecar["bytes"] for sidecar in sidecars)
    skipped = sorted((s for c in sidecars for s in c["skipped"]), key=lambda s: s["file"])
    if not sum(lengths):
        reasons = "; ".join(f"{s['file']}: {s['reason']}" for s in skipped[:3])
        raise UsageError(f"nothing of the inputs can be used: {reasons}")
    by_hash = defaultdict(list)
    for sidecar in sidecars:
        for name, digest in sidecar["hashes"]:
            by_hash[digest].append(name)
    is_video, part = np.array(columns["is_video"], bool), np.array(columns["part"])
    frames, fps = np.array(columns["frames"]), np.array(columns["fps"])
    report = {
        "plan": identity,
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
    }
    _write_json(output / REPORT, report)
    write_metadata(output, shard_lengths=lengths, num_bytes=num_bytes, columns=columns)
    shutil.rmtree(output / WORK)
    return report


def summary(report: dict[str, Any]) -> str:
    """The report as a few lines."""
    lines = [
        f"{report['images']} images and {report['video_clips']} video clips "
        f"({report['video_frames']} frames, {report['video_hours']:.3g} hours) in "
        f"{report['shards']} shards: {report['bytes_in'] / 2**20:.1f} MiB became "
        f"{report['bytes_out'] / 2**20:.1f} MiB",
        *(f"duplicates: {', '.join(names)}" for names in report["duplicates"]),
        f"skipped: {len(report['skipped'])} files",
        *(f"  {entry['file']}: {entry['reason']}" for entry in report["skipped"]),
    ]
    return "\n".join(lines)


def _write_json(path: Path, value: Any) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)
