"""The training run: eval, save, next batch, step. Reads top to bottom."""

import dataclasses
import math
import os
import time
from pathlib import Path

import jax
import ml_collections
import numpy as np

from elastictok_jax.config import flatten, read_config, resolve, sequence_tokens, to_json
from elastictok_jax.data.pipeline import BatchReader, local_rows, read_ahead, to_device
from elastictok_jax.errors import RunError, UsageError
from elastictok_jax.models.patching import to_uint8, unpatchify
from elastictok_jax.parallel.mesh import make_mesh
from elastictok_jax.parallel.sharding import batch_sharding, in_mesh, replicated
from elastictok_jax.training.checkpoint import Checkpointer
from elastictok_jax.training.interrupt import StopRequest
from elastictok_jax.training.metrics import Console, MetricWriter
from elastictok_jax.training.state import TrainState, abstract_state, sharded_init
from elastictok_jax.training.step import make_eval_step, make_train_step
from elastictok_jax.training.throughput import peak_flops, train_flops_per_token
from elastictok_jax.weights.lpips import load_lpips

EVAL_FRACTIONS = (1.0, 0.5, 0.25)  # shares of a block's tokens
FIXED_ON_RESUME = ("model.", "video.", "optimizer.ema_decay")


def train(config: ml_collections.ConfigDict, *, workdir: Path) -> bool:
    """Trains in `workdir` until `config.train.steps`, resuming from what is there.

    What a run starts from, in order of precedence:
      1. The newest whole checkpoint in `workdir/checkpoints` gives the state and data position.
      2. The config passed here gives everything else. It may change on resume, except for the
         keys that shape the state (FIXED_ON_RESUME), which must equal `workdir/config.json`.
      3. With no checkpoint, the state is a function of `config.seed`.

    Returns:
      True when finished, False when stopped early by SIGTERM or Ctrl-C (saved either way).

    Raises:
      UsageError: bad config, data or workdir; nothing is changed on disk then.
      RunError: non-finite loss, or a checkpoint that cannot be written.
    """
    config = resolve(config)
    mesh = make_mesh(config)
    sharding = batch_sharding(mesh)
    rows = local_rows(sharding, config.data.batch_size)
    reader = BatchReader(config, split="train", rows=rows)
    held_out = open_held_out(config, rows)
    lpips_params = {}
    if config.loss.lpips_weight:
        lpips_params = jax.device_put(load_lpips(config.loss.lpips_net), replicated(mesh))
    prepare_workdir(workdir, config)

    checkpoints = Checkpointer(
        workdir, keep_last=config.train.keep_last, keep_best=config.train.keep_best
    )
    abstract = abstract_state(config, mesh)
    latest = checkpoints.latest_step()
    if latest is None:
        state, position = sharded_init(config, abstract), {"next_batch": 0}
    else:
        state, position = checkpoints.restore(latest, abstract)
    start = latest or 0
    writer = MetricWriter(workdir, config, start_step=start)
    console = Console(total=config.train.steps, start=start)
    console.line(describe(config, abstract, start=start, workdir=workdir))

    state_sharding = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    train_step = in_mesh(
        jax.jit(make_train_step(config), donate_argnums=0, out_shardings=(state_sharding, None)),
        mesh,
    )
    eval_step = in_mesh(jax.jit(make_eval_step(config)), mesh)
    log = StepLog(config, writer, console, workdir)
    batches = read_ahead(
        reader, start=position["next_batch"], stop=position["next_batch"] + config.train.steps - start
    )
    on_device = (to_device(batch, sharding) for batch in batches)

    try:
        with StopRequest() as stop:
            for step in range(start, max(start, config.train.steps) + 1):
                last = step >= config.train.steps or stop.requested
                due = {key: step % config.train[key] == 0 for key in ("eval_every", "checkpoint_every")}
                eval_metrics = None
                # A resumed step has its eval and its checkpoint already.
                if step != latest and (due["eval_every"] or step == config.train.steps):
                    log.flush()
                    eval_metrics = evaluate(eval_step, state, held_out, sharding, step, writer, config)
                    log.record_eval(step, eval_metrics)
                if step != start and (due["checkpoint_every"] or last):
                    log.flush()  # refuses a non-finite state before it can be saved
                    checkpoints.save(
                        step,
                        state,
                        data_position={"next_batch": position["next_batch"] + step - start},
                        config=config,
                        metrics=eval_metrics,
                    )
                    log.pause()
                if last:
                    break
                waited = time.perf_counter()
                batch = next(on_device)
                waited = time.perf_counter() - waited
                with jax.transfer_guard("disallow"):
                    state, metrics = train_step(state, batch, lpips_params)
                log.record(step + 1, metrics, waited)
                console.advance()
        checkpoints.finish()
    finally:
        checkpoints.close()
        writer.close()
        console.close()
    finished = step >= config.train.steps
    console.line(f"{'finished' if finished else 'stopped'} at step {step}, saved in {workdir}")
    return finished


def open_held_out(config: ml_collections.ConfigDict, rows: range) -> list[dict[str, np.ndarray]]:
    """The held-out batches, the same at every evaluation; empty if nothing is held out."""
    if config.data.source != "embedded" and config.data.eval_fraction == 0:
        return []
    reader = BatchReader(config, split="heldout", rows=rows)
    return list(read_ahead(reader, start=0, stop=config.evaluation.batches))


def prepare_workdir(workdir: Path, config: ml_collections.ConfigDict) -> None:
    """Makes `workdir` and writes config.json.

    Raises:
      UsageError: if it cannot be written, or was begun with a config of another state.
    """
    path = workdir / "config.json"
    if path.exists():
        old, new = flatten(read_config(path)), flatten(config)
        changed = [
            f"{key} {old[key]!r} -> {new[key]!r}"
            for key in sorted(new)
            if key.startswith(FIXED_ON_RESUME) and old[key] != new[key]
        ]
        if changed:
            raise UsageError(
                f"workdir {workdir} holds a run with another model: {', '.join(changed)}. "
                "Use its config, or another --workdir"
            )
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(to_json(config))
        os.replace(temporary, path)
    except OSError as error:
        raise UsageError(
            f"workdir {workdir} cannot be written ({error.strerror}): choose a writable --workdir"
        ) from None


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


def evaluate(eval_step, state, held_out, sharding, step, writer, config) -> dict[str, float]:
    """Held-out MSE at fixed shares of tokens; a picture where there is somewhere to show it."""
    results: dict[str, float] = {}
    columns = []
    for fraction in EVAL_FRACTIONS if held_out else ():
        sums: list = []
        for index, batch in enumerate(held_out):
            metrics, reconstruction = eval_step(
                state.eval_params, to_device(batch, sharding), jax.device_put(np.float32(fraction))
            )
            sums.append(metrics)
            if index == 0 and writer.shows_pictures:
                columns.append(first_frames(np.asarray(to_uint8(reconstruction)), config))
        total = jax.tree.map(lambda *values: float(np.sum(values)), *jax.device_get(sums))
        suffix = "" if fraction == 1 else f"_at_{fraction:g}"
        results[f"eval/mse{suffix}"] = total["error"] / total["tokens"]
        if fraction == 1 and "usage" in total:
            results["eval/codebook_usage"] = total["usage"] / len(held_out)
            results["eval/codebook_perplexity"] = total["perplexity"] / len(held_out)
    if columns:
        original = first_frames(held_out[0]["patches"], config)
        picture = np.concatenate([original, *columns], axis=1)
        writer.picture(step, "eval/original_then_all_half_quarter_tokens", picture)
    return results


def first_frames(patches_BSD: np.ndarray, config: ml_collections.ConfigDict) -> np.ndarray:
    """The first frame of each row, one below the other: uint8 [B R, R, 3]."""
    side = config.video.resolution
    video = unpatchify(
        patches_BSD,
        patch=tuple(config.model.patch),
        frames_per_block=config.video.frames_per_block,
        height=side,
        width=side,
    )
    return np.concatenate(list(video[:, 0]), axis=0)


@dataclasses.dataclass
class StepLog:
    """Holds the metrics of steps on the device and reads them only when a line is due.

    A line is read one step late, when the next step is already on its way, so that the device
    never waits for the host.
    """

    config: ml_collections.ConfigDict
    writer: MetricWriter
    console: Console
    workdir: Path

    def __post_init__(self) -> None:
        self._pending: list[tuple[int, dict[str, jax.Array]]] = []
        self._waited = 0.0
        self._steps = 0
        self._since: float | None = None  # None until the first step is compiled and done
        self._flops_per_step = train_flops_per_token(self.config) * (
            self.config.data.batch_size * sequence_tokens(self.config)
        )
        self._peak = peak_flops(self.config.model.dtype) * jax.device_count()

    def record(self, step: int, metrics: dict[str, jax.Array], waited: float) -> None:
        """Takes a step's metrics; reads and writes those of the steps before it when due."""
        if self._pending and self._pending[-1][0] % self.config.train.log_every == 0:
            self.flush()
        self._pending.append((step, metrics))
        self._waited += waited
        self._steps += 1

    def flush(self) -> None:
        """Reads all pending metrics, checks that they are finite, and writes the due line.

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
        for step, metrics in read:
            if step % self.config.train.log_every == 0:
                values = {key: float(value) for key, value in metrics.items()} | self._speed()
                self.writer.scalars(step, values)
                self.console.scalars(step, values)

    def record_eval(self, step: int, values: dict[str, float]) -> None:
        """Writes an evaluation; its time counts for no step."""
        if values:
            self.writer.scalars(step, values)
            self.console.scalars(step, values)
        self.pause()

    def pause(self) -> None:
        """Starts the clock anew: what was just done is no part of a step."""
        self._since, self._steps, self._waited = time.perf_counter(), 0, 0.0

    def _speed(self) -> dict[str, float]:
        now = time.perf_counter()
        if self._since is None or not self._steps:
            self.pause()
            return {}
        seconds = (now - self._since) / self._steps
        tokens = self.config.data.batch_size * sequence_tokens(self.config)
        speed = {
            "step_seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "model_flop_utilisation": self._flops_per_step / seconds / self._peak,
            "wait_fraction": self._waited / (now - self._since),
        }
        self.pause()
        return speed


