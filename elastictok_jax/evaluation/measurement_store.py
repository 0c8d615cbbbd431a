"""Stores the records of measured clips on disk, so that an interrupted evaluation can resume.

Jobs (a model and a clip) are distributed over the devices of this process, each with its own thread
and copy of the weights. Except for timings, a record is a function of model, clip and plan alone.
"""

import hashlib
import io
import queue
import threading
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import astuple
from pathlib import Path

import jax
import numpy as np

from elastictok_jax.evaluation.clip_metrics import ClipMetrics
from elastictok_jax.evaluation.eval_clips import EvalClip
from elastictok_jax.evaluation.measure import MeasurementPlan, Record, measure_clip
from elastictok_jax.storage.atomic import write_atomically
from elastictok_jax.tokenizer import entropy
from elastictok_jax.tokenizer.api import ElasticTokenizer

FORMAT = 1  # of a record: incremented when its keys or their meaning change


def measure_with_store(
    tokenizers: Sequence[ElasticTokenizer],
    clips: Sequence[EvalClip],
    plan: MeasurementPlan,
    frame_metrics: ClipMetrics,
    *,
    folder: Path,
    devices: Sequence[jax.Device],
    progress: Callable[[int, int], None],
) -> list[dict[str, Record]]:
    """Measures every clip with each tokenizer on `devices`, reusing the records in `folder`.

    `progress` is called with (clips done, all clips) over all tokenizers.

    Returns:
      Records by clip name for each tokenizer, in the given order.
    """
    jobs: queue.SimpleQueue[tuple[int, int, Path]] = queue.SimpleQueue()
    results: list[dict[str, Record]] = [{} for _ in tokenizers]
    total = len(tokenizers) * len(clips)
    for model, tokenizer in enumerate(tokenizers):
        for index, clip in enumerate(clips):
            path = folder / f"{_digest(tokenizer, clip, plan, frame_metrics)}.npz"
            record = _load(path)
            if record is None:
                jobs.put((model, index, path))
            else:
                results[model][clip.name] = record
    done = total - jobs.qsize()
    progress(done, total)
    lock = threading.Lock()
    failures: list[BaseException] = []

    def work(device: jax.Device) -> None:
        nonlocal done
        placed: dict[int, ElasticTokenizer] = {}
        while not failures:
            try:
                model, index, path = jobs.get_nowait()
            except queue.Empty:
                return
            try:
                compiles = model not in placed
                if compiles:
                    placed = {model: tokenizers[model].on(device)}
                with jax.default_device(device):
                    record = measure_clip(placed[model], clips[index], plan, frame_metrics)
                if compiles:  # its timings include compilation
                    record |= {k: np.asarray(np.nan) for k in record if k.endswith("/seconds")}
                buffer = io.BytesIO()
                np.savez_compressed(buffer, **record)  # type: ignore[arg-type]
                write_atomically(path, buffer.getvalue())
            except BaseException as error:
                failures.append(error)
                return
            with lock:
                results[model][clips[index].name] = record
                done += 1
                progress(done, total)

    if len(devices) == 1:
        work(devices[0])  # in this thread, so that Ctrl-C interrupts it
    else:
        threads = [threading.Thread(target=work, args=(d,), daemon=True) for d in devices]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
    order = [clip.name for clip in clips]
    return [{name: records[name] for name in order} for records in results]


def _digest(
    tokenizer: ElasticTokenizer, clip: EvalClip, plan: MeasurementPlan, frame_metrics: ClipMetrics
) -> str:
    """Returns 16 hex digits over everything that a record depends on."""
    router = tokenizer.router is not None and tokenizer.router.digest
    lengths = (tokenizer.geometry.fixed_tokens, tokenizer.min_tokens, tokenizer.window_blocks)
    model = (tokenizer.fingerprint, router, lengths, entropy.is_entropy_coder_installed())
    said = (
        FORMAT,
        model,
        astuple(plan),
        frame_metrics.name,
        clip.name,
        clip.fps,
        clip.frames.shape,
    )
    digest = hashlib.sha256(repr(said).encode())
    digest.update(np.ascontiguousarray(clip.frames).tobytes())
    return digest.hexdigest()[:16]


def _load(path: Path) -> Record | None:
    """Reads the record in a file; returns None if it is missing or unreadable."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {key: stored[key] for key in stored.files}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
