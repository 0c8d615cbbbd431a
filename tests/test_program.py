"""The process of a command: Ctrl-C, closed and failing standard streams, and how jax starts."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from elastictok_jax import ctrl_c
from elastictok_jax.data.sources.file_source import EMBEDDED

INTERRUPT = "import os, signal; os.kill(os.getpid(), signal.SIGINT)"
PROGRAM = [sys.executable, "-m", "elastictok_jax"]
# Moments at which a Ctrl-C may arrive, as experiment files that `train` runs.
MOMENTS = {
    "in Python": INTERRUPT,
    "in a finalizer": f"""
class Finalized:
    def __del__(self):
        {INTERRUPT}
Finalized()
import time; time.sleep(60)
""",
    "and an extension makes another error of it": f"""
try:
    {INTERRUPT}
except KeyboardInterrupt:
    raise SystemError("returned a result with an exception set")
""",
    "while threads work that Python waits for at its end": f"""
import threading, time
def work():
    time.sleep(60)
    raise RuntimeError
threading.Thread(target=work).start()
{INTERRUPT}
""",
    "and code swallows it, twice": f"""
import time
try:
    {INTERRUPT}
except BaseException:
    time.sleep({2 * ctrl_c.ECHO})
    {INTERRUPT}
    time.sleep(60)
""",
}


def run(*words, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*PROGRAM, *map(str, words)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def shell(command: str) -> subprocess.CompletedProcess:
    """Runs `command`, in which $E is the program."""
    return subprocess.run(
        ["bash", "-c", f'set -o pipefail; E="{sys.executable} -m elastictok_jax"; {command}'],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c_is_one_line_that_says_how_to_go_on(tmp_path, moment):
    (tmp_path / "experiment.py").write_text(MOMENTS[moment])
    done = run("train", tmp_path / "experiment.py", "--workdir", tmp_path / "run")
    assert done.returncode == 130
    assert done.stdout == ""
    assert done.stderr == f"elastictok: interrupted: {ctrl_c.ADVICE['train']}\n"


def test_ctrl_c_while_extensions_load_is_one_line():
    running = subprocess.Popen([*PROGRAM, "evaluate", "nosuch", "-o", "out"], stderr=-1, text=True)
    while "libjax_common" not in Path(f"/proc/{running.pid}/maps").read_text():
        assert running.poll() is None
    running.send_signal(signal.SIGINT)
    _, error = running.communicate(timeout=100)
    assert running.returncode == 130
    assert error == f"elastictok: interrupted: {ctrl_c.ADVICE['evaluate']}\n"


def test_ctrl_c_to_all_processes_of_prepare_is_one_line(tmp_path):
    running = subprocess.Popen(
        [
            *(*PROGRAM, "prepare", str(EMBEDDED), "-o", str(tmp_path / "out")),
            *("--jobs", "2", "--shard-mib", "0.2"),
        ],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children")
    while len(children.read_text().split()) < 3:  # two workers, and Python's resource tracker
        assert running.poll() is None
    os.killpg(running.pid, signal.SIGINT)
    _, error = running.communicate(timeout=100)
    assert running.returncode == 130
    assert error == f"elastictok: interrupted: {ctrl_c.ADVICE['prepare']}\n"


def test_a_reader_that_is_gone_ends_the_program_silently():
    for words in ("experiments", "--help"):
        done = shell(f"(sleep 0.1; $E {words}) | exec true")
        assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("words", ["experiments", "--version", "experiments --json"])
def test_a_full_standard_output_is_said(words):
    done = shell(f"$E {words} > /dev/full")
    assert done.returncode == 1
    assert done.stderr.startswith("elastictok: error: standard output cannot be written (No space")
    assert len(done.stderr.splitlines()) == 1


def test_messages_that_cannot_be_written_do_not_stop_the_work(tmp_path):
    for number, redirection in enumerate(("2>&-", "2>/dev/full", "2>&- >&- <&-")):
        output = tmp_path / f"out{number}"
        done = shell(f"$E prepare {EMBEDDED}/heldout/photo_chelsea.jpg -o {output} {redirection}")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert (output / "report.json").is_file()


def test_a_closed_standard_input_has_no_frames(tmp_path):
    done = shell(f"$E encode - -o {tmp_path}/a.etok --model nosuch --tokens 4 <&-")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("JAX_PLATFORMS", "foo", "JAX_PLATFORMS=foo: jax finds no such device (Unable to"),
        ("JAX_PLATFORMS", "cuda", "JAX_PLATFORMS=cuda: jax finds no such device ("),
        ("JAX_ENABLE_X64", "banana", "jax does not start (invalid truth value 'banana'"),
        ("SLURM_NTASKS", "two", "SLURM_NTASKS=two: must be a number"),
        ("OMPI_COMM_WORLD_SIZE", "1.5", "OMPI_COMM_WORLD_SIZE=1.5: must be a number"),
    ],
)
def test_an_environment_that_jax_cannot_start_in_is_one_line(tmp_path, variable, value, said):
    words = ("train", "quickstart", "--workdir", tmp_path / "run")
    done = run(*words, **{variable: value})
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"elastictok: error: {said}")
    assert not (tmp_path / "run").exists()


def test_every_verb_that_runs_a_model_says_which_backend_is_missing(tmp_path):
    done = run("inspect-data", "quickstart", "-o", tmp_path / "a.png", JAX_PLATFORMS="foo")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "JAX_PLATFORMS=foo: jax finds no such device" in line
