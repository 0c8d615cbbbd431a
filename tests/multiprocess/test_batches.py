"""The same global batches, byte for byte, from any number of processes and workers, and after
saving on one number of processes and restoring on another."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from elastictok_jax.data.sources.splits import open_splits
from tests.multiprocess.launched import free_port
from tests.tiny import reader_of

SCRIPT = Path(__file__).with_name("read_batches.py")
config_for = runpy.run_path(str(SCRIPT))["config_for"]
BATCHES, SAVED_AT = 80, 37


def read(folder, *, processes, options=()):
    """{(batch, key): global array} put together from the shards that all processes had."""
    output = folder / f"{processes}-{len(list(folder.iterdir()))}"
    output.mkdir()
    words = ["--processes", processes, "--port", free_port(), "--output", output]
    words += ["--workdir", folder / "run", "--batches", BATCHES, *options]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {
        "JAX_PLATFORMS": "cpu"
    }
    running = [
        subprocess.Popen(
            [sys.executable, SCRIPT, "--process", str(process), *map(str, words)],
            stderr=subprocess.PIPE,
            text=True,
            env=environment | {"PYTHONPATH": str(Path(__file__).parents[2])},
        )
        for process in range(processes)
    ]
    errors = [process.communicate(timeout=300)[1] for process in running]
    assert all(process.returncode == 0 for process in running), "\n".join(errors)
    pieces = {}
    for process in range(processes):
        with np.load(output / f"{process}.npz") as shards:
            for name in shards.files:
                batch, key, corner = json.loads(name)
                pieces.setdefault((batch, key), []).append((corner, shards[name]))
    whole = {}
    for name, parts in pieces.items():
        assert len(parts) == 4  # one a device
        high = [max(c[axis] + p.shape[axis] for c, p in parts) for axis in range(len(parts[0][0]))]
        whole[name] = np.empty(high, parts[0][1].dtype)
        for corner, part in parts:
            place = tuple(slice(c, c + n) for c, n in zip(corner, part.shape, strict=True))
            whole[name][place] = part
    return whole


@pytest.fixture(scope="module")
def expected():
    """Read here, row after row, with no threads or workers."""
    config = config_for(0)
    reader = reader_of(config, open_splits(config), split="train")
    return [reader(index) for index in range(BATCHES)]


def assert_same(got, expected, *, start=0):
    assert {index for index, _ in got} == set(range(start, len(expected)))
    for index in range(start, len(expected)):
        for key in ("patches", "segment_ids"):
            value = expected[index][key]
            assert got[index, key].shape == value.shape and got[index, key].dtype == value.dtype
            assert got[index, key].tobytes() == value.tobytes(), (index, key)


@pytest.mark.parametrize(("processes", "workers"), [(1, 3), (2, 1), (4, 0)])
def test_same_global_batches(tmp_path, expected, processes, workers):
    got = read(tmp_path, processes=processes, options=["--workers", workers])
    assert_same(got, expected)
    assert max(value["segment_ids"].max() for value in expected) > 1  # clips were packed


def test_saved_on_four_processes_and_restored_on_two(tmp_path, expected):
    before = read(tmp_path, processes=4, options=["--save-at", SAVED_AT])
    assert_same(before, expected[:SAVED_AT])
    after = read(tmp_path, processes=2, options=["--restore"])
    assert_same(after, expected, start=SAVED_AT)
