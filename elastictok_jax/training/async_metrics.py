"""Reads metrics of steps from the device and logs them, without making the device wait."""

import dataclasses
import math
import time
from pathlib import Path

import jax
import ml_collections
import numpy as np

from elastictok_jax.errors import RunError
from elastictok_jax.hardware import peak_flops
from elastictok_jax.models.base import Task
from elastictok_jax.training.metric_writers import ConsoleWriter, MetricWriter, SilentWriter

# Steps that the host may run ahead: enough to keep the device busy, few enough that batches do not
# pile up in its memory.
IN_FLIGHT = 2


@dataclasses.dataclass
class StepLog:
    """Keeps the metrics of steps on the device and reads them only when a line is due.

    A line is read one step late, when the next step is already dispatched, so that the device
    never waits for the host. Metrics and votes are replicated on all devices, so all processes
    read the same values after the same step.
    """

    config: ml_collections.ConfigDict
    task: Task
    writer: MetricWriter | SilentWriter
    console: ConsoleWriter | SilentWriter
    workdir: Path
    replaced_blocks: int = 0  # over all processes, as of the last step read

    def __post_init__(self) -> None:
        self.stop_agreed = False  # becomes true after the same step in all processes
        self._stops: list[jax.Array] = []  # votes of the steps in flight
        self._pending: list[tuple[int, dict[str, jax.Array]]] = []
        self._waited = 0.0
        self._steps = 0
        self._since = time.perf_counter()
        self._compiled = False  # most of the first step's time is compilation
        rows = self.config.data.batch_size
        self._flops_per_step = self.task.flops_per_row() * rows
        self._tokens_per_step = math.prod(self.task.batch_spec(rows)["segment_ids"].shape)
        self._peak = peak_flops(self.config.compute.dtype) * jax.device_count()

    def record(self, step: int, metrics: dict[str, jax.Array], waited: float) -> None:
        """Stores the metrics of a step; writes those of earlier steps when a line is due."""
        self._waited += waited  # before the flush, which ends the interval that the line covers
        if self._pending and self._pending[-1][0] % self.config.train.log_every == 0:
            self.flush()
        if len(self._pending) >= IN_FLIGHT:
            jax.block_until_ready(self._pending[-IN_FLIGHT][1])
        self._stops.append(metrics.pop("stop"))
        if len(self._stops) > IN_FLIGHT:
            self.stop_agreed |= bool(jax.device_get(self._stops.pop(0)))
        self._pending.append((step, metrics))
        self._steps += 1
        if not self._compiled:
            self._compiled = True
            self.pause()

    def flush(self) -> None:
        """Reads all pending metrics, checks that they are finite, and writes the line that is due.

        Raises:
          RunError: naming the first step whose loss or gradient is not finite.
        """
        if not self._pending:
            return
        read = jax.device_get(self._pending)
        self._pending = []
        for step, metrics in read:
            if not (np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])):
                raise RunError(
                    f"loss is {float(metrics['loss'])} with gradient norm "
                    f"{float(metrics['grad_norm'])} at step {step}: stopped. The checkpoints in "
                    f"{self.workdir / 'checkpoints'} are from before it. To go on, run the same "
                    "command again with --config.optimizer.learning_rate lower, or another "
                    "--config.seed to see other batches"
                )
        self.replaced_blocks = int(read[-1][1]["replaced_blocks"])
        for step, metrics in read:
            if step % self.config.train.log_every == 0:
                values = {key: float(value) for key, value in metrics.items()} | self._speed()
                if not values["replaced_blocks"]:
                    del values["replaced_blocks"]
                self.writer.scalars(step, values)
                self.console.scalars(step, values)

    def record_eval(self, step: int, values: dict[str, float]) -> None:
        """Writes the metrics of an evaluation, whose time is not counted as a step's."""
        if values:
            self.writer.scalars(step, values)
            self.console.scalars(step, values)
        self.pause()

    def pause(self) -> None:
        """Restarts the clock after work that is not part of a step."""
        self._since, self._steps, self._waited = time.perf_counter(), 0, 0.0

    def _speed(self) -> dict[str, float]:
        now = time.perf_counter()
        if not self._steps:
            return {}
        seconds = (now - self._since) / self._steps
        speed = {
            "step_seconds": seconds,
            "tokens_per_second": self._tokens_per_step / seconds,
            "model_flop_utilisation": self._flops_per_step / seconds / self._peak,
            "wait_fraction": self._waited / (now - self._since),
        }
        self.pause()
        return speed
