"""What the source distribution holds: all that a checkout does."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("setuptools")
ROOT = Path(__file__).parents[1]
FOLDERS = ("benchmarks", "docs", "elastictok_jax", "experiments", "launch", "tests", "tools")


def test_the_source_distribution_can_be_tested_and_read(tmp_path):
    subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        timeout=100,
        check=True,
    )
    (sources,) = tmp_path.glob("*/SOURCES.txt")
    packed = {line for line in sources.read_text().splitlines() if (ROOT / line).is_file()}
    folders = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    names = {path.relative_to(ROOT).as_posix() for path in folders if path.is_file()}
    names = {name for name in names if "__pycache__" not in name}
    assert names <= packed
    top = {"README.md", "CHANGELOG.md", "LICENSE", "Makefile", "pyproject.toml", "setup.py"}
    assert top <= packed
