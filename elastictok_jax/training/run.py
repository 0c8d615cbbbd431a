"""Opens the parts of a training run, those that can fail cheaply first."""

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import ml_collections

from elastictok_jax.data.batch_sharding import batch_to_device, local_batch_part
from elastictok_jax.data.pipeline import BatchReader, DeviceBatches
from elastictok_jax.data.sources.splits import open_splits
from elastictok_jax.errors import RunError
from elastictok_jax.models.base import Task
from elastictok_jax.models.open_model import best_metric
from elastictok_jax.models.registry import family_of_config
from elastictok_jax.parallel.backend import require_devices
from elastictok_jax.parallel.distributed import (
    FIRST_SECONDS,
    broadcast_from_first,
    require_same_process_count,
    wait_for_all_processes,
)
from elastictok_jax.parallel.liveness import Peers
from elastictok_jax.parallel.mesh import make_mesh
from elastictok_jax.parallel.sharding import (
    batch_sharding,
    replicate,
    replicated,
    sharding_notes,
    with_logical_axes,
)
from elastictok_jax.storage.checkpoint import Checkpointer, DamagedCheckpoint
from elastictok_jax.training.async_metrics import StepLog
from elastictok_jax.training.evaluator import (
    evaluate_batches,
    read_evaluator_batches,
    require_best_metric,
)
from elastictok_jax.training.host_consensus import Votes
from elastictok_jax.training.initialise import initialise
from elastictok_jax.training.lock import WorkdirLock
from elastictok_jax.training.metric_writers import (
    ConsoleWriter,
    MetricWriter,
    SilentWriter,
    metric_writers_take_pictures,
    open_wandb,
    require_sinks,
)
from elastictok_jax.training.state import TrainState, abstract_state, init_state_sharded
from elastictok_jax.training.step import jit_train_step
from elastictok_jax.training.watchdog import Watchdog
from elastictok_jax.training.workdir import (
    enter_workdir,
    write_workdir_config,
    write_workdir_held_out,
)


@dataclasses.dataclass
class Run:
    """A run that is ready for its next step.

    Attributes:
      resumed: whether it resumes from a checkpoint.
      start, steps: the step that it starts at, and the last one.
      state: at step `start`; the loop donates it to the first step.
      frozen: the task's read-only arrays, on the devices.
      train_step: jitted; takes state, batch, frozen and votes.
      evaluate: returns the metrics of a step's weights.
      raise_if_lost: raises RunError once another process has taken over the workdir.
    """

    config: ml_collections.ConfigDict
    workdir: Path
    task: Task
    resumed: bool
    start: int
    steps: int
    state: TrainState
    frozen: Any
    reader: BatchReader
    files: Any
    batches: DeviceBatches
    replaced_before: int
    votes: Votes
    train_step: Callable
    evaluate: Callable[[int, TrainState], dict[str, float]]
    checkpoints: Checkpointer
    log: StepLog
    console: ConsoleWriter | SilentWriter
    watchdog: Watchdog
    raise_if_lost: Callable[[], None]

    def save(self, step: int, state: TrainState, metrics: dict[str, float] | None) -> None:
        """Starts writing a checkpoint with the position in the data."""
        position = {
            "next_row": self.reader.first_row + (step - self.start) * self.config.data.batch_size,
            "files": self.files,
            "replaced_blocks": self.log.replaced_blocks,
        }
        self.checkpoints.save(
            step, state, data_position=position, config=self.config, metrics=metrics
        )

    def next_batch(self) -> dict[str, jax.Array]:
        """Returns the next batch, and prints which of its blocks had to be replaced.

        Raises:
          RunError: says what is wrong with the data, and what is saved.
        """
        try:
            batch = next(self.batches)
        except RunError as error:
            raise RunError(
                f"{error}. Stopped: step {self.checkpoints.latest_step() or 0} is the newest "
                "saved; repair the data, then run the same command again"
            ) from error
        while self.batches.new_faults:
            self.console.own_line(f"replaced: {self.batches.new_faults.pop(0)}")
        return batch

    @property
    def replaced_blocks(self) -> int:
        """Blocks that this process has replaced; process 0 adds those from before a resume."""
        return self.batches.replaced + (self.replaced_before if jax.process_index() == 0 else 0)


def open_run(
    config: ml_collections.ConfigDict, *, workdir: Path, peers: Peers, stack: contextlib.ExitStack
) -> Run:
    """Opens a run, whose parts are closed by `stack`.

    Raises:
      UsageError, RunError: as `loop.train_experiment` does.
    """
    require_same_process_count(timeout=FIRST_SECONDS)
    require_devices()
    family = family_of_config(config)
    task = family.task
    mesh = make_mesh(config, check_model=task.check_mesh)
    sharding = batch_sharding(mesh)
    part = local_batch_part(sharding, config, family.codec.geometry)
    require_sinks(config)
    require_best_metric(task, config)
    raise_if_lost, wandb_run = _hold_workdir(workdir, config, first=peers.process == 0, stack=stack)
    splits = open_splits(config)
    reader = task.reader(splits, split="train", part=part)
    held_out = read_evaluator_batches(task, config, splits, part=part)
    frozen = replicate(task.frozen(), mesh)
    files = splits.fingerprint()
    enter_workdir(workdir, config, files=files)
    wait_for_all_processes(mesh, timeout=FIRST_SECONDS)
    watchdog = Watchdog(
        step_timeout=config.train.step_timeout,
        pause_timeout=config.train.pause_timeout,
        stacks=workdir / f"stacks-{peers.process}.txt",
        end=lambda reason: peers.end(f"{reason}. {peers.kept()}"),
    )
    stack.callback(watchdog.close)

    checkpoints = Checkpointer(
        workdir,
        keep_last=config.train.keep_last,
        keep_best=config.train.keep_best,
        best=best_metric(config, family),
    )
    stack.callback(checkpoints.close)
    peers.before_end = checkpoints.finish
    abstract = abstract_state(task, config, mesh)
    notes = sharding_notes(abstract)
    steps_there = json.dumps(checkpoints.steps())  # as process 0 sees them: others may lag
    candidates = json.loads(broadcast_from_first("checkpoints", steps_there, timeout=FIRST_SECONDS))
    start = 0
    if not candidates:
        state = init_state_sharded(task, config, abstract)
        if config.train.init_from:
            state, taken = initialise(state, abstract, config=config, workdir=workdir)
            notes += taken
        position: dict[str, Any] = {"next_row": 0, "files": files}
    else:
        start, state, position, lost = _restore_newest(checkpoints, candidates, abstract)
        notes += lost
    write_workdir_config(workdir, config)
    write_workdir_held_out(workdir, splits.fingerprint("heldout"))
    reader = reader.from_row(position["next_row"])
    replaced_before = position.get("replaced_blocks", 0)  # over all processes
    steps = max(start, config.train.steps)
    writer: MetricWriter | SilentWriter = SilentWriter(peers.name)
    console: ConsoleWriter | SilentWriter = SilentWriter(peers.name)
    if peers.process == 0:
        writer = MetricWriter(workdir, config, start_step=start, wandb_run=wandb_run)
        console = ConsoleWriter(total=steps, start=start)
    stack.callback(writer.close)
    stack.callback(console.close)
    console.line(_run_startup_line(config, task, abstract, start=start, workdir=workdir))
    notes += [f"left out: {damaged}" for damaged in splits.damaged]
    notes += [f"note: {note}" for note in splits.notes]
    if position["files"] != files:
        notes.append("note: the data files have changed since this run was saved: it goes on,")
        notes.append("      but not as it would have with the old ones")
    for note in notes:
        console.line(note)

    everywhere = replicated(mesh)  # so that every process reads the same metrics
    eval_step = with_logical_axes(
        jax.jit(task.evaluate, out_shardings=(everywhere, sharding)), mesh
    )
    draw = with_logical_axes(jax.jit(task.picture, out_shardings=everywhere), mesh)

    def evaluated(step: int, state: TrainState) -> dict[str, float]:
        return evaluate_batches(
            task,
            eval_step,
            state.eval_params,
            frozen,
            held_out,
            place=partial(
                batch_to_device,
                part=reader.part,
                sharding=sharding,
                block_inputs=reader.geometry.inputs,
            ),
            draw=draw,
            show=partial(writer.picture, step) if metric_writers_take_pictures(config) else None,
        )

    batches = DeviceBatches(
        reader, sharding, start=0, stop=steps - start, replaced_before=replaced_before
    )
    stack.callback(batches.close)
    return Run(
        config=config,
        workdir=workdir,
        task=task,
        resumed=bool(candidates),
        start=start,
        steps=steps,
        state=state,
        frozen=frozen,
        reader=reader,
        files=files,
        batches=batches,
        replaced_before=replaced_before,
        votes=Votes(mesh),
        train_step=with_logical_axes(jit_train_step(task, config, abstract), mesh),
        evaluate=evaluated,
        checkpoints=checkpoints,
        log=StepLog(config, task, writer, console, workdir, replaced_blocks=replaced_before),
        console=console,
        watchdog=watchdog,
        raise_if_lost=raise_if_lost,
    )


def _hold_workdir(
    workdir: Path,
    config: ml_collections.ConfigDict,
    *,
    first: bool,
    stack: contextlib.ExitStack,
) -> tuple[Callable[[], None], Any]:
    """Locks `workdir` until `stack` ends and starts the wandb run, in the first process alone.

    Both come before data is read, since both may fail.

    Returns:
      a function that raises RunError once the lock is lost, and the wandb run or None.
    """
    if not first:
        return lambda: None, None
    lock = WorkdirLock(workdir)
    stack.callback(lock.close)
    return lock.raise_if_lost, open_wandb(workdir, config)


def _restore_newest(
    checkpoints: Checkpointer, steps: list[int], abstract: TrainState
) -> tuple[int, TrainState, dict[str, Any], list[str]]:
    """Restores the first of `steps` whose checkpoint can be read.

    Damaged ones before it are moved out of the way. With several processes, damage may be visible
    to one alone: it then ends the run, and the next start resumes from the checkpoint before.

    Returns:
      step, state, position in the data, and a line for the log on each damaged checkpoint.

    Raises:
      UsageError: if the weights have other shapes.
      RunError: if none can be read; or, with several processes, if the first one cannot.
    """
    damaged: list[tuple[int, DamagedCheckpoint]] = []
    for step, before in zip(steps, [*steps[1:], None], strict=True):
        try:
            state, position = checkpoints.restore(step, abstract)
            if not {"next_row", "files"} <= position.keys():
                raise DamagedCheckpoint(f"checkpoint {step} has no position in the data")
        except DamagedCheckpoint as error:
            damaged.append((step, error))
            if before is None:
                reasons = "; ".join(str(each) for _, each in damaged)
                raise RunError(
                    f"{reasons}: no checkpoint is left to go on from. Restore one from a copy, or "
                    "start anew in another --workdir"
                ) from error
            if jax.process_count() > 1:
                aside = checkpoints.set_aside(step)
                raise RunError(
                    f"{error} and was moved to {aside}: run the same command again in every "
                    f"process to go on from step {before}"
                ) from error
        else:
            break
    lines = [
        f"note: {error} and was moved to {checkpoints.set_aside(number)}: going on from step {step}"
        for number, error in damaged
    ]
    return step, state, position, lines


def _run_startup_line(
    config: ml_collections.ConfigDict,
    task: Task,
    abstract: TrainState,
    *,
    start: int,
    workdir: Path,
) -> str:
    """Returns a line on what is about to run."""
    weights = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract.params))
    kind = jax.devices()[0].device_kind
    tokens = math.prod(task.batch_spec(1)["segment_ids"].shape)
    begin = f"resuming at step {start}" if start else "starting"
    return (
        f"{begin}: {config.name} in {workdir}, {weights / 1e6:.2f}M parameters, "
        f"{config.data.batch_size} x {tokens} tokens a step, "
        f"{jax.device_count()} x {kind}"
    )
