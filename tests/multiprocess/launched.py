"""Training runs in several real processes on this machine, each with its stderr in a file."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

OPTIONS = {
    "model.width": 16,
    "model.mlp_width": 32,
    "model.encoder_layers": 1,
    "model.decoder_layers": 1,
    "model.heads": 1,
    "video.resolution": 16,
    "masking.min_tokens": 1,
    "loss.lpips_weight": 0,
    "optimizer.warmup_steps": 5,
    "train.log_every": 1,
    "data.batch_size": 4,
    "data.sequence_blocks": 2,
    "evaluation.batches": 1,
}
LIMIT = 300  # seconds that anything may take before the test gives up


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def words(workdir: Path, options: dict) -> list[str]:
    """Arguments of `elastictok train`."""
    overrides = [f"--config.{key}={value}" for key, value in (OPTIONS | options).items()]
    return ["train", "quickstart", "--workdir", str(workdir), *overrides]


def environment(devices: int = 1) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    # Python's tracker of shared memory speaks after a process that ended in haste, past its last
    # word.
    quiet = {"PYTHONWARNINGS": "ignore:resource_tracker"}
    # Every process but the first compiles all programs anew: the cache is the first's.
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return kept | quiet | quick | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}


class Processes:
    """`processes` times `python -m elastictok_jax train` in one workdir, `devices` each.

    Args:
      options: config overrides of all; `last_options`: those of the last process alone.
      folders: where each runs, if not here.
      last_prefix: words before the last process's command.
      logs: folder for what each says.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        processes: int,
        options: dict,
        devices: int = 1,
        folders: Sequence[Path] | None = None,
        last_options: dict | None = None,
        last_prefix: Sequence[str] = (),
        logs: Path | None = None,
    ):
        self.workdir, logs = workdir, logs or workdir.parent
        attempt = len(list(logs.glob("*-0.log")))
        where = ["--coordinator", f"localhost:{free_port()}", "--processes", str(processes)]
        self.logs, self.processes = [], []
        for process in range(processes):
            log = logs / f"{workdir.name}-{attempt}-{process}.log"
            is_last = process == processes - 1
            own = options | (last_options or {}) if is_last else options
            command = [*(last_prefix if is_last else ()), sys.executable, "-m"]
            command += ["elastictok_jax", *words(workdir, own), *where]
            with log.open("w") as file:
                self.processes.append(
                    subprocess.Popen(
                        [*command, "--process", str(process)],
                        stderr=file,
                        env=environment(devices) | {"PYTHONPATH": str(Path(__file__).parents[2])},
                        cwd=folders[process] if folders else None,
                    )
                )
            self.logs.append(log)

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            process.kill()  # also one that is stopped
            process.wait()

    def text(self, process: int) -> str:
        return self.logs[process].read_text()

    @property
    def report(self) -> str:
        return "\n".join(f"== {log.name}\n{log.read_text()}" for log in self.logs)

    def steps_logged(self) -> int:
        return sum(line.startswith("step ") and " loss " in line for line in self.lines(0))

    def lines(self, process: int) -> list[str]:
        return self.text(process).splitlines()

    def until(self, condition: Callable[[], bool]) -> None:
        """Returns as soon as `condition` holds; all processes have to be alive till then."""
        deadline = time.monotonic() + LIMIT
        while not condition():
            assert all(process.poll() is None for process in self.processes), self.report
            if time.monotonic() > deadline:
                pytest.fail(f"waited too long:\n{self.report}")
            time.sleep(0.001)

    def signal(self, process: int, number: signal.Signals) -> None:
        self.processes[process].send_signal(number)

    def wait(self, *, seconds: float = LIMIT, but: int | None = None) -> list[int]:
        """Exit statuses of all processes, without that of process `but`."""
        deadline = time.monotonic() + seconds
        codes = []
        for index, process in enumerate(self.processes):
            if index == but:
                continue
            try:
                codes.append(process.wait(max(0.1, deadline - time.monotonic())))
            except subprocess.TimeoutExpired:
                pytest.fail(f"process {index} did not end within {seconds} s:\n{self.report}")
        return codes


def saved_steps(workdir: Path) -> list[int]:
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return sorted(int(name) for name in names if name.isdigit())
