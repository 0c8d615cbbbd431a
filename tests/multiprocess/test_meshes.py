"""Meshes over several processes train like one device, and a run moves between process counts.

Each process is started anew and has its share of 8 fake devices; gloo carries what they exchange.
"""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.multiprocess.launched import free_port

SCRIPT = Path(__file__).with_name("train_steps.py")
run = SimpleNamespace(**runpy.run_path(str(SCRIPT)))
MESHES = ("8x1x1x1", "1x8x1x1", "2x2x2x1", "1x2x2x2", "1x1x1x8")

LIMIT = 580  # seconds that all processes of a run may take


def launch(folder, mesh, *options, processes, workdir="run", **overrides):
    """The reports of the processes of a run, that of the first with its "moments" after the first
    step if it made it, and what they wrote to stderr."""
    output = folder / f"report-{len(list(folder.iterdir()))}"
    output.mkdir()
    words = ["--processes", processes, "--port", free_port(), "--output", output, "--mesh", mesh]
    words += ["--workdir", folder / workdir, "--overrides", json.dumps(overrides), *options]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu"}
    running = [
        subprocess.Popen(
            [sys.executable, SCRIPT, "--process", str(process), *map(str, words)],
            stderr=subprocess.PIPE,
            text=True,
            env=environment | {"PYTHONPATH": str(Path(__file__).parents[2])},
        )
        for process in range(processes)
    ]
    try:
        errors = [process.communicate(timeout=LIMIT)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    if any(process.returncode for process in running):
        return None, errors
    reports = [json.loads((output / f"{i}.json").read_text()) for i in range(processes)]
    if (output / "moments.npz").exists():
        reports[0]["moments"] = dict(np.load(output / "moments.npz"))
    return reports, errors


def losses_of(reports, errors):
    assert reports is not None, "\n".join(errors)
    assert all(report["losses"] == reports[0]["losses"] for report in reports)
    return reports[0]["losses"]


@pytest.fixture(scope="module", params=["fsq", "vae"])
def one_device(request, tmp_path_factory):
    """The bottleneck; the losses of one device in one process, and its first moments."""
    folder = tmp_path_factory.mktemp("one")
    found = launch(folder, "1x1x1x1", processes=1, model__bottleneck=request.param)
    return request.param, losses_of(*found), found[0][0]["moments"]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("mesh", MESHES)
def test_thirty_steps_in_processes(one_device, mesh, processes, tmp_path):
    """Losses, and the gradients of the first step, of which AdamW's moments are shares."""
    bottleneck, want, want_moments = one_device
    found = launch(tmp_path, mesh, processes=processes, model__bottleneck=bottleneck)
    losses = losses_of(*found)
    assert losses[0] == pytest.approx(want[0], rel=1e-5)
    assert losses == pytest.approx(want, rel=run.TOLERANCE[bottleneck])
    run.assert_close_norms(found[0][0]["moments"], want_moments, rtol=1e-5, what=mesh)


@pytest.mark.slow
def test_saved_in_two_processes_and_continued_in_four_and_back_in_one(one_device, tmp_path):
    """On other meshes each time, and in four with the layers apart."""
    bottleneck, want, _ = one_device
    options = dict(model__bottleneck=bottleneck)
    first = launch(tmp_path, "8x1x1x1", "--save", "--steps", 10, processes=2, **options)
    second = launch(
        *(tmp_path, "1x2x2x2", "--restore", "--save", "--steps", 20),
        **options,
        processes=4,
        compute__scan_layers=False,
    )
    third = launch(tmp_path, "1x1x1x1", "--restore", processes=1, **options)
    losses = [*losses_of(*first), *losses_of(*second), *losses_of(*third)]
    assert losses == pytest.approx(want, rel=run.TOLERANCE[bottleneck])


def test_processes_are_the_slices_of_a_hybrid_mesh(tmp_path):
    """Only the axes that dcn sizes name leave a process."""
    options = dict(processes=2, mesh__dcn_fsdp=2)
    reports, errors = launch(tmp_path, "1x1x2x2", "--steps", 0, **options)
    assert reports is not None, "\n".join(errors)
    for report in reports:
        assert report["mesh"] == [1, 2, 2, 2]
        assert report["processes"] == [0] * 4 + [1] * 4
    reports, errors = launch(tmp_path, "1x1x2x1", "--steps", 0, **options)
    assert reports is None
    assert (
        "mesh.tensor=2, mesh.sequence=1: 2 devices are requested and 4 are available" in errors[0]
    )
