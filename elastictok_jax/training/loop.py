"""The training run: eval, save, next batch, step. Reads top to bottom."""

import contextlib
import math
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import ml_collections

from elastictok_jax.config import flatten, read_config, resolve, sequence_tokens, to_json
from elastictok_jax.data.pipeline import BatchReader, DeviceBatches, local_part, to_device
from elastictok_jax.data.sources import open_feeds
from elastictok_jax.errors import RunError, UsageError
from elastictok_jax.parallel.mesh import make_mesh
from elastictok_jax.parallel.sharding import batch_sharding, in_mesh, replicated, sharding_notes
from elastictok_jax.training.checkpoint import Checkpointer
from elastictok_jax.training.initialise import initialise
from elastictok_jax.training.interrupt import StopRequest
from elastictok_jax.training.metrics import Console, MetricWriter, require_sinks
from elastictok_jax.training.state import TrainState, abstract_state, sharded_init
from elastictok_jax.training.step import jit_train_step, make_eval_step
from elastictok_jax.training.steplog import StepLog
from elastictok_jax.training.validation import evaluate, open_held_out
from elastictok_jax.weights.lpips import load_lpips

# What the state and its meaning hang on. Execution (dtype, remat, attention, mesh) may change.
FIXED_ON_RESUME = (
    *("model.width", "model.mlp_width", "model.encoder_layers", "model.decoder_layers"),
    *("model.heads", "model.patch", "model.bottleneck", "model.fsq_levels", "model.vae_dim"),
    *("model.rope_theta", "model.norm_eps", "model.conditioned", "video."),
)


def train(config: ml_collections.ConfigDict, *, workdir: Path) -> bool:
    """Trains in `workdir` until `config.train.steps`, resuming from what is there.

    What a run starts from, in order of precedence:
      1. The newest whole checkpoint in `workdir/checkpoints` gives the state and data position.
      2. The config passed here gives everything else. It may change on resume, except for the
         keys that the state hangs on (FIXED_ON_RESUME), which must equal `workdir/config.json`.
      3. With no checkpoint, the state is a function of `config.seed`, but for the weights if
         `config.train.init_from` names another run to take them from.

    Returns:
      True when finished, False when stopped early by SIGTERM or Ctrl-C (saved either way).

    Raises:
      UsageError: bad config, data or workdir; what was saved there stays as it is.
      RunError: non-finite loss, a file that cannot be decoded, or a checkpoint that cannot be
        written.
    """
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopRequest())  # first in, so that it outlasts the last save
        return _train(resolve(config), workdir, stop, stack)


def _train(
    config: ml_collections.ConfigDict, workdir: Path, stop: StopRequest, stack: contextlib.ExitStack
) -> bool:
    mesh = make_mesh(config)
    sharding = batch_sharding(mesh)
    rows, blocks = local_part(sharding, config)
    require_sinks(config)
    feeds = open_feeds(config)
    reader = BatchReader(config, feeds, split="train", rows=rows, blocks=blocks)
    held_out = open_held_out(config, feeds, rows=rows, blocks=blocks)
    lpips_params = {}
    if config.loss.lpips_weight:
        lpips_params = jax.device_put(load_lpips(config.loss.lpips_net), replicated(mesh))
    prepare_workdir(workdir, config)

    checkpoints = Checkpointer(
        workdir, keep_last=config.train.keep_last, keep_best=config.train.keep_best
    )
    stack.callback(checkpoints.close)
    abstract = abstract_state(config, mesh)
    notes = sharding_notes(abstract)
    latest = checkpoints.latest_step()
    files = feeds.fingerprint()
    if latest is None:
        state = sharded_init(config, abstract)
        if config.train.init_from:
            state, taken = initialise(state, abstract, config=config, workdir=workdir)
            notes += taken
        position: dict[str, Any] = {"next_row": 0, "files": files}
    else:
        state, position = checkpoints.restore(latest, abstract)
    write_config(workdir, config)
    start, reader.first_row = latest or 0, position["next_row"]
    steps = max(start, config.train.steps)
    writer = MetricWriter(workdir, config, start_step=start)
    stack.callback(writer.close)
    console = Console(total=steps, start=start)
    stack.callback(console.close)
    console.line(describe(config, abstract, start=start, workdir=workdir))
    for note in notes:
        console.line(note)
    for damaged in feeds.damaged:
        console.line(f"left out: {damaged}")
    if position["files"] != files:
        console.line("note: the data files have changed since this run was saved: it goes on,")
        console.line("      but not as it would have with the old ones")

    train_step = in_mesh(jit_train_step(config, abstract), mesh)
    eval_step = in_mesh(jax.jit(make_eval_step(config)), mesh)
    log = StepLog(config, writer, console, workdir)
    batches = DeviceBatches(reader, sharding, start=0, stop=steps - start)
    stack.callback(batches.close)

    for step in range(start, steps + 1):
        last = step == steps or stop.requested
        eval_metrics = None
        # A resumed step has its evaluation and its checkpoint already.
        if step != latest and (step % config.train.eval_every == 0 or step == steps):
            log.flush()
            eval_metrics = evaluate(
                eval_step,
                state.eval_params,
                held_out,
                place=partial(to_device, reader=reader, sharding=sharding),
                config=config,
                show=partial(writer.picture, step) if writer.shows_pictures else None,
            )
            log.record_eval(step, eval_metrics)
        if step != start and (step % config.train.checkpoint_every == 0 or last):
            log.flush()  # refuses a non-finite state before it can be saved
            next_row = reader.first_row + (step - start) * config.data.batch_size
            checkpoints.save(
                step,
                state,
                data_position={"next_row": next_row, "files": files},
                config=config,
                metrics=eval_metrics,
            )
            log.pause()
        if last:
            break
        waited = time.perf_counter()
        batch = next_batch(batches, checkpoints)
        waited = time.perf_counter() - waited
        while batches.new_faults:
            console.line(f"replaced: {batches.new_faults.pop(0)}")
        with jax.transfer_guard("disallow"):
            state, metrics = train_step(state, batch, lpips_params)
        if batches.replaced:
            metrics["replaced_blocks"] = batches.replaced
        log.record(step + 1, metrics, waited)
        console.advance()

    checkpoints.finish()
    saved = checkpoints.latest_step()
    kept = "nothing to save yet" if saved is None else f"step {saved} is saved in {workdir}"
    console.line(f"{'finished' if step == steps else 'stopped'} at step {step}: {kept}")
    return step == steps


def next_batch(batches: DeviceBatches, checkpoints: Checkpointer) -> dict[str, jax.Array]:
    """The next batch.

    Raises:
      RunError: what is wrong with the data, and what is saved.
    """
    try:
        return next(batches)
    except RunError as error:
        raise RunError(
            f"{error}. Stopped: step {checkpoints.latest_step() or 0} is the newest saved; mend "
            "the data, then run the same command again"
        ) from error


def prepare_workdir(workdir: Path, config: ml_collections.ConfigDict) -> None:
    """Makes `workdir` and sees that it can be written.

    Raises:
      UsageError: if it cannot be written, or has checkpoints of another model.
    """
    path = workdir / "config.json"
    if path.exists():
        old, new = flatten(read_config(path)), flatten(config)
        changed = [
            f"{key} {old[key]!r} -> {new[key]!r}"
            for key in sorted(new)
            if key.startswith(FIXED_ON_RESUME) and old[key] != new[key]
        ]
        if changed and any((workdir / "checkpoints").glob("[0-9]*")):
            raise UsageError(
                f"workdir {workdir} holds a run with another model: {', '.join(changed)}. "
                "Use its config, or another --workdir"
            )
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_config(workdir, config)
        with path.open("a"):
            pass
    except OSError as error:
        raise UsageError(
            f"workdir {workdir} cannot be written ({error.strerror}): choose a writable --workdir"
        ) from None


def write_config(workdir: Path, config: ml_collections.ConfigDict) -> None:
    """Writes config.json whole or not at all."""
    temporary = workdir / "config.tmp"
    temporary.write_text(to_json(config))
    os.replace(temporary, workdir / "config.json")


def describe(config, abstract: TrainState, *, start: int, workdir: Path) -> str:
    """One line on what is about to run."""
    weights = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract.params))
    kind = jax.devices()[0].device_kind
    begin = f"resuming at step {start}" if start else "starting"
    return (
        f"{begin}: {config.name} in {workdir}, {weights / 1e6:.2f}M parameters, "
        f"{config.data.batch_size} x {sequence_tokens(config)} tokens a step, "
        f"{jax.device_count()} x {kind}"
    )
