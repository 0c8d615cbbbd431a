"""Evaluates a task on held-out data during training, at each of its operating points."""

import time
from collections.abc import Callable, Sequence

import jax
import ml_collections
import numpy as np

from elastictok_jax.data.batch_sharding import BatchPart
from elastictok_jax.data.pipeline import read_ahead
from elastictok_jax.data.sources.held_out import has_held_out
from elastictok_jax.data.sources.splits import SourceSplits
from elastictok_jax.errors import UsageError
from elastictok_jax.models.base import Task

PICTURED = 3  # operating points in the picture, the first ones
PICTURE = "eval/original_and_decoded"
STEP_COST = 3  # forward passes that a training step costs: one forward, two for the backward pass


def read_evaluator_batches(
    task: Task, config: ml_collections.ConfigDict, splits: SourceSplits, *, part: BatchPart
) -> list[dict[str, np.ndarray]]:
    """Reads the held-out batches, the same for every evaluation; [] if no data is held out.

    Their number is `evaluation.batches`, or as many as keep the operations of evaluation within the
    fraction `evaluation.max_cost` of those of training, but at least one.
    """
    if not has_held_out(config):
        return []
    reader = task.reader(splits, split="heldout", part=part)
    forward_passes = config.evaluation.max_cost * STEP_COST * config.train.eval_every
    afforded = max(1, int(forward_passes / len(task.points)))
    return list(read_ahead(reader, start=0, stop=min(config.evaluation.batches, afforded)))


def evaluate_batches(
    task: Task,
    eval_step: Callable,
    params,
    frozen,
    batches: Sequence[dict[str, np.ndarray]],
    *,
    place: Callable[[dict[str, np.ndarray]], dict[str, jax.Array]],
    draw: Callable[[jax.Array], jax.Array],
    show: Callable[[str, np.ndarray], None] | None,
) -> dict[str, float]:
    """Returns the task's metrics over `batches`, with "eval/" before their names.

    All processes must call this.

    Args:
      eval_step: the jitted `Task.evaluate`.
      place: puts a batch on the devices.
      draw: the jitted `Task.picture`, with its output replicated.
      show: writes a picture: originals beside their reconstructions at the first points.
    """
    start = time.perf_counter()
    if not batches:
        return {}
    columns = [np.asarray(draw(place(batches[0])["patches"]))] if show else []
    totals = []
    for rank, point in enumerate(task.points):
        sums = []
        for index, batch in enumerate(batches):
            of_batch, drawable = eval_step(params, frozen, place(batch), np.float32(point))
            sums.append(of_batch)
            if index == 0 and show and rank < PICTURED:
                columns.append(np.asarray(draw(drawable)))
        totals.append(_total(jax.device_get(sums)))
    results = {f"eval/{name}": value for name, value in task.summarise(totals).items()}
    results["eval/seconds"] = time.perf_counter() - start
    if show:
        show(PICTURE, np.concatenate(columns, axis=1))
    return results


def _total(sums: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Adds up the sums of batches; [B, N] values of blocks are concatenated instead."""
    return {
        name: np.concatenate([some[name].reshape(-1) for some in sums])
        if value.ndim == 2
        else np.sum([some[name] for some in sums], axis=0)
        for name, value in sums[0].items()
    }


def require_best_metric(task: Task, config: ml_collections.ConfigDict) -> None:
    """Raises UsageError if `train.best_metric` is not a metric of the task's evaluations."""
    names = [f"eval/{name}" for name in task.better]
    if config.train.best_metric not in names:
        raise UsageError(
            f"train.best_metric = {config.train.best_metric!r}: choose one of {', '.join(names)}"
        )
