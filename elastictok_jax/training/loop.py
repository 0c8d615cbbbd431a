"""The training run: eval, save, next batch, step. Reads top to bottom."""

import contextlib
import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import ml_collections

from elastictok_jax.config import resolve, sequence_tokens
from elastictok_jax.data.pipeline import BatchReader, DeviceBatches, local_part, to_device
from elastictok_jax.data.sources.splits import open_splits
from elastictok_jax.errors import RunError
from elastictok_jax.parallel.backend import require_devices
from elastictok_jax.parallel.distributed import (
    FIRST_SECONDS,
    first_says,
    meet,
    require_same_count,
)
from elastictok_jax.parallel.liveness import Peers
from elastictok_jax.parallel.mesh import make_mesh
from elastictok_jax.parallel.sharding import (
    batch_sharding,
    in_mesh,
    replicate,
    replicated,
    sharding_notes,
)
from elastictok_jax.perceptual.lpips_weights import load_lpips
from elastictok_jax.storage.checkpoint import Checkpointer, DamagedCheckpoint
from elastictok_jax.training.async_metrics import StepLog
from elastictok_jax.training.evaluator import (
    evaluate,
    make_first_frames,
    open_held_out,
    require_best_metric,
)
from elastictok_jax.training.host_consensus import Votes
from elastictok_jax.training.initialise import initialise
from elastictok_jax.training.lock import WorkdirLock
from elastictok_jax.training.metric_writers import (
    Console,
    MetricWriter,
    Silent,
    open_wandb,
    require_sinks,
    shows_pictures,
)
from elastictok_jax.training.state import TrainState, abstract_state, sharded_init
from elastictok_jax.training.step import jit_train_step, make_eval_step
from elastictok_jax.training.stop_signal import StopRequest
from elastictok_jax.training.watchdog import Watchdog
from elastictok_jax.training.workdir import (
    enter_workdir,
    newest_saved,
    write_config,
    write_held_out,
)


def train(config: ml_collections.ConfigDict, *, workdir: Path) -> bool:
    """Trains in `workdir` until `config.train.steps`, resuming from what is there.

    What a run starts from, in order of precedence:
      1. The newest whole checkpoint in `workdir/checkpoints` gives the state and data position.
      2. The config passed here gives everything else. It may change on resume, except for the
         keys that the state hangs on (workdir.py), which must equal `workdir/config.json`.
      3. With no checkpoint, the state is a function of `config.seed`, but for the weights if
         `config.train.init_from` names another run to take them from.

    In several processes, all call this alike: they decide the same after the same step, and only
    the first writes and speaks. When one fails, hangs or is lost, all end with exit status 1 or 2,
    a line that says why, and no return from here (parallel/peers.py).

    Returns:
      True when finished, False when stopped early by SIGTERM or Ctrl-C in any process (saved
      either way).

    Raises:
      UsageError: bad config, data or workdir; what was saved there stays as it is.
      RunError: non-finite loss, a file that cannot be decoded, or a checkpoint that cannot be
        written.
    """
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopRequest())  # first in, so that it outlasts the last save
        peers = Peers(kept=partial(newest_saved, workdir))
        with peers.shared_fate():
            return _train(resolve(config), workdir, stop, peers, stack)


def _train(
    config: ml_collections.ConfigDict,
    workdir: Path,
    stop: StopRequest,
    peers: Peers,
    stack: contextlib.ExitStack,
) -> bool:
    require_same_count(timeout=FIRST_SECONDS)
    require_devices()
    mesh = make_mesh(config)
    sharding = batch_sharding(mesh)
    part = local_part(sharding, config)
    require_sinks(config)
    require_best_metric(config)
    raise_if_lost, wandb_run = hold_workdir(workdir, config, first=peers.process == 0, stack=stack)
    feeds = open_splits(config)
    reader = BatchReader(config, feeds, split="train", part=part)
    held_out = open_held_out(config, feeds, part=part)
    lpips_params = {}
    if config.loss.lpips_weight:
        lpips_params = replicate(load_lpips(config.loss.lpips_net), mesh)
    files = feeds.fingerprint()
    enter_workdir(workdir, config, files=files)
    meet(mesh, timeout=FIRST_SECONDS)
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
        best_metric=config.train.best_metric,
    )
    stack.callback(checkpoints.close)
    peers.before_end = checkpoints.finish
    abstract = abstract_state(config, mesh)
    notes = sharding_notes(abstract)
    steps_there = json.dumps(checkpoints.steps())  # as process 0 sees it, should others lag
    candidates = json.loads(first_says("checkpoints", steps_there, timeout=FIRST_SECONDS))
    latest = None
    if not candidates:
        state = sharded_init(config, abstract)
        if config.train.init_from:
            state, taken = initialise(state, abstract, config=config, workdir=workdir)
            notes += taken
        position: dict[str, Any] = {"next_row": 0, "files": files}
    else:
        latest, state, position, lost = restore_newest(checkpoints, candidates, abstract)
        notes += lost
    write_config(workdir, config)
    write_held_out(workdir, feeds.fingerprint("heldout"))
    start, reader.first_row = latest or 0, position["next_row"]
    replaced_before = position.get("replaced_blocks", 0)  # by all processes
    steps = max(start, config.train.steps)
    writer: MetricWriter | Silent = Silent(peers.name)
    console: Console | Silent = Silent(peers.name)
    if peers.process == 0:
        writer = MetricWriter(workdir, config, start_step=start, wandb_run=wandb_run)
        console = Console(total=steps, start=start)
    stack.callback(writer.close)
    stack.callback(console.close)
    console.line(startup_line(config, abstract, start=start, workdir=workdir))
    notes += [f"left out: {damaged}" for damaged in feeds.damaged]
    notes += [f"note: {note}" for note in feeds.notes]
    if position["files"] != files:
        notes.append("note: the data files have changed since this run was saved: it goes on,")
        notes.append("      but not as it would have with the old ones")
    for note in notes:
        console.line(note)

    whole = replicated(mesh)  # so that every process reads the same metrics
    train_step = in_mesh(jit_train_step(config, abstract), mesh)
    eval_step = in_mesh(jax.jit(make_eval_step(config), out_shardings=(whole, sharding)), mesh)
    draw = in_mesh(jax.jit(make_first_frames(config), out_shardings=whole), mesh)
    log = StepLog(config, writer, console, workdir, replaced_blocks=replaced_before)
    votes = Votes(mesh)
    batches = DeviceBatches(
        reader, sharding, start=0, stop=steps - start, replaced_before=replaced_before
    )
    stack.callback(batches.close)

    stop.take_interrupts()  # before this there is nothing to save
    for step in range(start, steps + 1):
        last = step == steps or log.stop_agreed
        eval_metrics = None
        # A resumed step has its evaluation and its checkpoint already.
        if step != latest and (step % config.train.eval_every == 0 or step == steps):
            log.flush()
            watchdog.pause()
            eval_metrics = evaluate(
                eval_step,
                state.eval_params,
                held_out,
                place=partial(to_device, reader=reader, sharding=sharding),
                draw=draw,
                show=partial(writer.picture, step) if shows_pictures(config) else None,
                config=config,
            )
            log.record_eval(step, eval_metrics)
        if step != start and (step % config.train.checkpoint_every == 0 or last):
            log.flush()  # refuses a non-finite state before it can be saved
            watchdog.pause()
            next_row = reader.first_row + (step - start) * config.data.batch_size
            checkpoints.save(
                step,
                state,
                data_position={
                    "next_row": next_row,
                    "files": files,
                    "replaced_blocks": log.replaced_blocks,
                },
                config=config,
                metrics=eval_metrics,
            )
            log.pause()
        if last:
            break
        checkpoints.raise_if_failed()
        raise_if_lost()
        waited = time.perf_counter()
        batch = next_batch(batches, checkpoints)
        waited = time.perf_counter() - waited
        while batches.new_faults:
            console.own_line(f"replaced: {batches.new_faults.pop(0)}")
        replaced = batches.replaced + (replaced_before if peers.process == 0 else 0)
        wishes = votes.cast(stop=stop.requested, replaced_blocks=replaced)
        with jax.transfer_guard("disallow"):
            state, metrics = train_step(state, batch, lpips_params, wishes)
        log.record(step + 1, metrics, waited)
        console.advance()
        watchdog.step()

    watchdog.pause()
    checkpoints.finish()
    saved = checkpoints.latest_step()
    kept = "nothing is saved" if saved is None else f"step {saved} is saved in {workdir}"
    console.own_line(f"{'finished' if step == steps else 'stopped'} at step {step}: {kept}")
    return step == steps


def hold_workdir(
    workdir: Path,
    config: ml_collections.ConfigDict,
    *,
    first: bool,
    stack: contextlib.ExitStack,
) -> tuple[Callable[[], None], Any]:
    """Locks `workdir` until `stack` ends and starts the wandb run, in the first process alone.

    Both come before data is read, as both may be refused.

    Returns:
      what raises RunError once the lock is lost, and the wandb run or None.
    """
    if not first:
        return lambda: None, None
    lock = WorkdirLock(workdir)
    stack.callback(lock.close)
    return lock.raise_if_lost, open_wandb(workdir, config)


def restore_newest(
    checkpoints: Checkpointer, steps: list[int], abstract: TrainState
) -> tuple[int, TrainState, dict[str, Any], list[str]]:
    """The first of `steps` whose checkpoint can be read: step, state, position in the data, and a
    line on each damaged one, which is moved out of the way.

    In several processes damage may be seen by one alone: that ends the run, and the next start
    goes on from the checkpoint before.

    Raises:
      UsageError: if the weights have other shapes.
      RunError: if none can be read; or, in several processes, if the first cannot.
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


def next_batch(batches: DeviceBatches, checkpoints: Checkpointer) -> dict[str, jax.Array]:
    """The next batch.

    Raises:
      RunError: what is wrong with the data, and what is saved.
    """
    try:
        return next(batches)
    except RunError as error:
        raise RunError(
            f"{error}. Stopped: step {checkpoints.latest_step() or 0} is the newest saved; repair "
            "the data, then run the same command again"
        ) from error


def startup_line(config, abstract: TrainState, *, start: int, workdir: Path) -> str:
    """One line on what is about to run."""
    weights = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract.params))
    kind = jax.devices()[0].device_kind
    begin = f"resuming at step {start}" if start else "starting"
    return (
        f"{begin}: {config.name} in {workdir}, {weights / 1e6:.2f}M parameters, "
        f"{config.data.batch_size} x {sequence_tokens(config)} tokens a step, "
        f"{jax.device_count()} x {kind}"
    )
