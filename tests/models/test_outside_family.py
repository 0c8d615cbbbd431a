"""A family of another installed package goes through the program's normal verbs."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CLIP = ROOT / "elastictok_jax/data/embedded/heldout/bbb_kite.mp4"
EXPERIMENT = ROOT / "tests/models/toy_experiment.py"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Installs the toy as a package with an entry point."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "toy_family.py").write_text((ROOT / "tests/models/toy.py").read_text())
    info = folder / "toy_family-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-family\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[elastictok_jax.families]\ntoy = toy_family\n")
    return folder


def run(site, *words, status=0):
    """Runs a verb where the toy is installed; returns its standard output."""
    path = os.pathsep.join([str(site), str(ROOT)])
    done = subprocess.run(  # noqa: PLW1510
        [sys.executable, "-m", "elastictok_jax", *map(str, words)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
        cwd=site,
    )
    assert done.returncode == status, done.stderr
    return done.stdout if status == 0 else done.stderr


def test_the_normal_verbs_work(site, tmp_path):
    workdir = tmp_path / "run"
    for steps in (20, 40):
        keys = [f"--config.train.steps={steps}", "--config.train.eval_every=20"]
        run(site, "train", EXPERIMENT, "--workdir", workdir, *keys)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    errors = [line["eval/mse"] for line in lines if "eval/mse" in line]
    assert len(errors) == 3 and errors[-1] < 0.8 * errors[0]  # at 0, 20 and 40: it resumed
    file = tmp_path / "clip.etok"
    goal = ["--max-mse", "0.2", "--max-frames", "8", "--json"]
    made = json.loads(run(site, "encode", CLIP, "-o", file, "--model", workdir, *goal))
    assert made["frames"] == 8 and made["tokens"] > 0
    run(site, "decode", file, "-o", tmp_path / "clip.mkv", "--model", workdir)
    limits = ["--max-clips", "1", "--max-blocks", "2", "--targets", "0.1"]
    run(site, "evaluate", workdir, *limits, "-o", tmp_path / "report")
    assert (tmp_path / "report" / "report.html").is_file()


def test_a_family_that_is_not_installed_is_named(tmp_path):
    words = ("train", EXPERIMENT, "--workdir", tmp_path / "run")
    assert "model.family = 'toy': choose one of elastictok" in run(tmp_path, *words, status=2)


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="no TPU compiler: jax[tpu]")
def test_it_compiles_for_a_tpu(site):
    words = ("compile", EXPERIMENT, "--topology", "v5e:2x2", "--config.data.batch_size=4", "--json")
    results = json.loads(run(site, *words))
    assert all(part["fits"] for part in (results, results["encode"], results["decode"]))
