"""The training loop: evaluate, save, read a batch, step."""

import contextlib
import time
from functools import partial
from pathlib import Path

import jax
import ml_collections

from elastictok_jax.config import resolve_config
from elastictok_jax.parallel.liveness import Peers
from elastictok_jax.training.run import Run, open_run
from elastictok_jax.training.stop_signal import StopRequest
from elastictok_jax.training.workdir import newest_saved_in_workdir


def train_experiment(config: ml_collections.ConfigDict, *, workdir: Path) -> bool:
    """Trains in `workdir` until `config.train.steps`, resuming from the newest checkpoint there.

    What a run starts from, in order of precedence:
      1. The newest complete checkpoint in `workdir/checkpoints` gives the state and data position.
      2. The config passed here gives everything else. It may change on resume, except for the
         keys that define the model (workdir.py), which must equal `workdir/config.json`.
      3. With no checkpoint, the state is a function of `config.seed`, except for the weights if
         `config.train.init_from` names another run to take them from.

    With several processes, all call this with the same config: they decide the same after the same
    step, and only process 0 writes and prints. When one fails, hangs or is lost, all exit with
    status 1 or 2 and a line that says why; this function does not return (parallel/liveness.py).

    Returns:
      True if finished, False if stopped early by SIGTERM or Ctrl-C in any process; the state is
      saved in both cases.

    Raises:
      UsageError: bad config, data or workdir; saved checkpoints are left as they are.
      RunError: non-finite loss, a file that cannot be decoded, or a checkpoint that cannot be
        written.
    """
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopRequest())  # entered first, to outlive the last save
        peers = Peers(kept=partial(newest_saved_in_workdir, workdir))
        with peers.shared_fate():
            run = open_run(resolve_config(config), workdir=workdir, peers=peers, stack=stack)
            return _run_steps(run, stop)


def _run_steps(run: Run, stop: StopRequest) -> bool:
    """Runs the remaining steps; returns as `train_experiment` does."""
    train_config, state, log = run.config.train, run.state, run.log
    run.state = None  # type: ignore[assignment]  # donated to the first step
    stop.take_interrupts()  # before this there is nothing to save
    for step in range(run.start, run.steps + 1):
        last = step == run.steps or log.stop_agreed
        eval_metrics = None
        # The step that a run resumes at has been evaluated and saved already.
        is_new = not (run.resumed and step == run.start)
        if is_new and (step % train_config.eval_every == 0 or step == run.steps):
            log.flush()
            run.watchdog.pause()
            eval_metrics = run.evaluate(step, state)
            log.record_eval(step, eval_metrics)
        if step != run.start and (step % train_config.checkpoint_every == 0 or last):
            log.flush()  # refuses a non-finite state before it can be saved
            run.watchdog.pause()
            run.save(step, state, eval_metrics)
            log.pause()
        if last:
            break
        run.checkpoints.raise_if_failed()
        run.raise_if_lost()
        waited = time.perf_counter()
        batch = run.next_batch()
        waited = time.perf_counter() - waited
        wishes = run.votes.cast(stop=stop.requested, replaced_blocks=run.replaced_blocks)
        with jax.transfer_guard("disallow"):
            state, metrics = run.train_step(state, batch, run.frozen, wishes)
        log.record(step + 1, metrics, waited)
        run.console.advance()
        run.watchdog.step()

    run.watchdog.pause()
    run.checkpoints.finish()
    saved = run.checkpoints.latest_step()
    kept = "nothing is saved" if saved is None else f"step {saved} is saved in {run.workdir}"
    done = "finished" if step == run.steps else "stopped"
    run.console.own_line(f"{done} at step {step}: {kept}")
    return step == run.steps
