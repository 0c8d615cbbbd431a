"""Several processes train as one: they stop, fail and start together, and only the first writes."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from elastictok_jax import cli
from elastictok_jax.data.sources.file_source import EMBEDDED
from elastictok_jax.errors import STOPPED, UsageError
from elastictok_jax.parallel.distributed import distributed_settings, in_cluster
from elastictok_jax.parallel.liveness import LOST
from elastictok_jax.training.metric_writers import read_metrics
from tests.multiprocess.launched import (
    LIMIT,
    Processes,
    environment,
    free_port,
    saved_steps,
    words,
)

SCRIPT = Path(__file__).parents[2] / "launch" / "local_processes.sh"


def test_sigterm_to_one_stops_both_at_one_step_and_they_go_on(tmp_path):
    workdir = tmp_path / "run"
    often = {"train.eval_every": 1000, "train.checkpoint_every": 1000}
    with Processes(workdir, processes=2, options=often | {"train.steps": 1000}) as run:
        run.until(lambda: run.steps_logged() >= 3)
        run.signal(1, signal.SIGTERM)
        assert run.wait() == [STOPPED, STOPPED], run.report
        (stopped,) = saved_steps(workdir)
        assert 3 <= stopped < 1000
        assert (
            run.lines(0)[-1] == f"stopped at step {stopped}: step {stopped} is saved in {workdir}"
        )
        assert "SIGTERM: saving, then stopping" in run.text(1)
        assert re.match(rf"process 1 of 2 \(.*\): stopped at step {stopped}: ", run.lines(1)[-1])
        # The first speaks for all.
        assert "step 3/1000" in run.text(0) and "step 3/1000" not in run.text(1)
        assert "Traceback" not in run.report

    # Started again by the script for one machine: all know of the checkpoint, and finish.
    steps = stopped + 3
    done = subprocess.run(
        [
            SCRIPT,
            "2",
            *words(workdir, often | {"train.steps": steps, "train.tensorboard": "true"})[1:],
        ],
        env=environment() | {"PYTHON": sys.executable, "PYTHONPATH": str(SCRIPT.parents[1])},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stderr
    assert f"resuming at step {stopped}:" in done.stderr
    assert f"finished at step {steps}: step {steps} is saved in {workdir}" in done.stderr
    assert f"elastictok evaluate {workdir}" in done.stderr
    lines = read_metrics(workdir / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, steps + 1))
    assert [line["step"] for line in lines if "eval/mse" in line] == [0, steps]
    assert saved_steps(workdir)[-1] == steps
    assert len(list((workdir / "tensorboard").iterdir())) == 1  # one writer
    assert "loss" not in (workdir / "process-1.log").read_text()


def test_a_hang_leaves_stacks_and_ends_in_time(tmp_path):
    # The other process does not go on: the main thread waits inside a collective for good.
    workdir = tmp_path / "run"
    options = {
        "train.steps": 100000,
        "train.eval_every": 100000,
        "train.checkpoint_every": 100000,
        "train.step_timeout": 10,
        "data.workers": 1,
    }
    with Processes(workdir, processes=2, options=options) as run:
        run.until(lambda: run.steps_logged() >= 3)
        workers = [w for p in run.processes for w in psutil.Process(p.pid).children()]
        assert workers
        run.signal(1, signal.SIGSTOP)
        assert run.wait(seconds=LOST - 5, but=1) == [1], run.report  # before it counts as lost
        stacks = workdir / "stacks-0.txt"
        assert run.lines(0)[-1] == (
            "elastictok: error: no step has ended for 10 s (train.step_timeout). The stacks of all "
            f"threads are above and in {stacks}. No step is saved yet in {workdir}: "
            "run the same command again in every process to go on from it"
        )
        for text in (stacks.read_text(), run.text(0)):
            assert re.search(r"Thread 0x\w+", text) and "training/loop.py" in text
        # Woken up, the other learns that the run has ended.
        run.signal(1, signal.SIGCONT)
        assert run.wait(seconds=60, but=0) == [1], run.report
        assert re.match(r"elastictok: error: process 0 of 2 .* (failed|was lost)", run.lines(1)[-1])
        assert psutil.wait_procs(workers, timeout=30)[1] == []  # none is left behind


def test_a_coordinator_that_is_not_there_is_named_in_time(tmp_path):
    where = f"localhost:{free_port()}"
    options = ["--coordinator", where, "--processes", "2", "--process", "1"]
    options += ["--initialization-timeout", "4"]
    done = subprocess.run(
        [sys.executable, "-m", "elastictok_jax", *words(tmp_path / "run", {}), *options],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        f"elastictok: error: not all processes met at {where} within --initialization-timeout = 4 s"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--processes 2", "--coordinator (or JAX_COORDINATOR_ADDRESS) and --process "),
        ("JAX_PROCESS_ID=1", "process = 1: --coordinator (or JAX_COORDINATOR_ADDRESS)"),
        ("--coordinator host --processes 2 --process 0", "write HOST:PORT"),
        ("--coordinator h:1 --processes 2 --process 2", "from 0 to processes"),
        ("OMPI_COMM_WORLD_SIZE=2", "--process $OMPI_COMM_WORLD_RANK"),
    ],
)
def test_half_given_settings_are_refused(tmp_path, monkeypatch, capsys, given, message):
    options = given.split() if given.startswith("--") else []
    if not options:
        monkeypatch.setenv(*given.split("="))
    assert cli.main([*words(tmp_path / "run", {}), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("elastictok: error: ") and message in line
    assert not (tmp_path / "run").exists()


def test_where_settings_come_from():
    none = dict.fromkeys(("coordinator", "processes", "process"))
    assert distributed_settings(none, {}) is None
    assert not in_cluster({})
    variables = {
        "JAX_COORDINATOR_ADDRESS": "host:1",
        "JAX_NUM_PROCESSES": "4",
        "JAX_PROCESS_ID": "3",
    }
    expected = {"coordinator_address": "host:1", "num_processes": 4, "process_id": 3}
    assert distributed_settings(none, variables) == expected
    given = none | {"process": 0}  # options first
    assert distributed_settings(given, variables)["process_id"] == 0
    with pytest.raises(UsageError, match="must be numbers"):
        distributed_settings(none, variables | {"JAX_NUM_PROCESSES": "four"})
    slurm = {"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "node[1-2]"}
    assert in_cluster(slurm)
    assert not in_cluster({"SLURM_NTASKS": "2"})  # a batch script's own shell
    assert not in_cluster(slurm | {"SLURM_NTASKS": "1"})
    assert in_cluster({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "1;tcp://10.0.0.1:1"})


def test_one_program_trains_twice_and_the_second_run_starts_with_the_first(tmp_path):
    address = f"localhost:{free_port()}"
    words_of = ["--processes", "2", "--coordinator", address, "--folder", str(tmp_path)]
    root = Path(__file__).parents[2]
    running = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.multiprocess.train_twice",
                "--process",
                number,
                *words_of,
            ],
            stderr=subprocess.PIPE,
            text=True,
            cwd=root,
            env=environment(),
        )
        for number in ("0", "1")
    ]
    errors = [process.communicate(timeout=LIMIT)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], errors
    record = json.loads((tmp_path / "second" / "init_from.json").read_text())
    assert record["from"] == f"{tmp_path / 'first'} at step 2"
    for name in ("first", "second"):
        assert saved_steps(tmp_path / name)[-1] == 3
        assert not (tmp_path / name / "lock.json").exists()


def test_two_processes_go_on_from_the_checkpoint_before_a_damaged_one(tmp_path):
    workdir = tmp_path / "run"
    options = {"train.steps": 4, "train.checkpoint_every": 2, "train.keep_last": 3}
    with Processes(workdir, processes=2, options=options) as run:
        assert run.wait() == [0, 0], run.report
    newest = saved_steps(workdir)[-1]
    for path in (workdir / "checkpoints" / str(newest)).glob("state/**/d/*"):
        path.write_bytes(bytes(path.stat().st_size))
    options["train.steps"] = 6
    with Processes(workdir, processes=2, options=options) as run:
        assert run.wait() == [1, 1], run.report
        assert "process to go on from step 2" in run.report
    assert newest not in saved_steps(workdir)
    with Processes(workdir, processes=2, options=options) as run:
        assert run.wait() == [0, 0], run.report
        assert "resuming at step 2" in run.text(0)
    assert saved_steps(workdir)[-1] == 6


@pytest.mark.slow
def test_two_processes_with_different_configs_are_refused(tmp_path):
    run = Processes(
        tmp_path / "run", processes=2, options={}, last_options={"optimizer.learning_rate": 0.5}
    )
    with run:
        assert run.wait() == [2, 2], run.report
    for process in (0, 1):
        assert re.search(r"optimizer.learning_rate \S+ there, 0.5 here", run.lines(process)[-1])
    assert run.lines(0)[-1].startswith("elastictok: error: process 1 of 2 ")


@pytest.mark.slow
def test_workdirs_that_are_not_shared_are_refused(tmp_path):
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    run = Processes(Path("run"), processes=2, options={}, folders=folders, logs=tmp_path)
    with run:
        assert run.wait() == [2, 2], run.report
    for process in (0, 1):
        assert "workdir run of process 1 is not that of process 0: " in run.lines(process)[-1]


@pytest.mark.slow
def test_too_much_bad_data_in_one_process_ends_both(tmp_path):
    # The same list of files for both, but the copies that the second reads are damaged.
    photos = [path for path in (EMBEDDED / "train").iterdir() if path.suffix == ".jpg"]
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        shutil.copytree(EMBEDDED, folder / "data", ignore=lambda *_: ["heldout", "train"])
        for photo in photos:
            shutil.copy2(photo, folder / "data" / photo.name)
    workdir = tmp_path / "run"
    options = {
        "data.sources.main.path": "data",
        "data.cache_mib": 0,
        "train.steps": 100000,
        "train.checkpoint_every": 20,
    }
    with Processes(workdir, processes=2, options=options, folders=folders) as run:
        run.until(lambda: saved_steps(workdir) and run.steps_logged() >= 20)
        for photo in photos:
            damaged = folders[1] / "data" / photo.name
            with damaged.open("r+b") as file:
                file.write(bytes(damaged.stat().st_size))
        assert run.wait(seconds=60) == [1, 1], run.report
        newest = saved_steps(workdir)[-1]
    for process in (0, 1):
        last = run.lines(process)[-1]
        assert "blocks could not be read, more than data.max_bad_fraction" in last
        assert "is the newest saved" in last and newest > 0
    assert run.lines(0)[-1].startswith("elastictok: error: process 1 of 2 ")
    assert "process 1 of 2 " in run.text(1) and "replaced: " in run.text(1)


@pytest.mark.slow
def test_a_save_that_fails_in_one_process_ends_both(tmp_path):
    # The second may write no file as large as its half of the weights.
    workdir = tmp_path / "run"
    options = {
        "train.steps": 100000,
        "train.eval_every": 100000,
        "train.checkpoint_every": 5,
        "model.width": 256,
        "mesh.fsdp": 2,
    }
    prefix = ["prlimit", "--fsize=50000"]
    with Processes(workdir, processes=2, options=options, last_prefix=prefix) as run:
        assert run.wait() == [1, 1], run.report
    assert not saved_steps(workdir)
    for process in (0, 1):
        assert "a checkpoint could not be written to" in run.lines(process)[-1], run.report
    assert run.lines(0)[-1].startswith("elastictok: error: process 1 of 2 ")
