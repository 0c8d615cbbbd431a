"""Lists the checkpoints of a training workdir, their metrics, and whether they can be read."""

from pathlib import Path
from typing import Any

import jax

from elastictok_jax.config import read_config
from elastictok_jax.errors import UsageError
from elastictok_jax.models.open_model import best_metric, is_exported_model
from elastictok_jax.models.registry import family_of_config
from elastictok_jax.storage.checkpoint import Checkpointer, DamagedCheckpoint


def inspect_run(folder: Path) -> dict[str, Any]:
    """Returns the checkpoints of a workdir, the newest first, as JSON values.

    Each has its `step`, whether it is the `newest` and the `best` by `best_metric`, the `value` of
    that metric or None, its `bytes` on disk, and `damage`: why its weights cannot be read, or "".
    All weights are read to find out, one checkpoint at a time.

    Raises:
      UsageError: if it is not a workdir with checkpoints.
    """
    if is_exported_model(folder):
        raise UsageError(f"{folder} is an exported model: it has no checkpoints")
    config = read_config(folder / "config.json")
    family = family_of_config(config)
    group, metric = family.task.groups[0], best_metric(config, family)
    device = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    wanted = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
        family.codec.params_shapes(),
    )
    checkpoints = Checkpointer.for_reading(folder)
    try:
        steps = checkpoints.choose(None, best=metric)
        best = checkpoints.best_steps(metric)[:1]

        def damage(step: int) -> str:
            try:
                checkpoints.restore_params(step, group, wanted)
            except DamagedCheckpoint as error:
                return str(error)
            return ""

        rows = [
            {
                "step": step,
                "newest": step == steps[0],
                "best": step in best,
                "value": checkpoints.metrics(step).get(metric.name),
                "bytes": checkpoints.size(step),
                "damage": damage(step),
            }
            for step in steps
        ]
    finally:
        checkpoints.close()
    return {"run": str(folder), "best_metric": metric.name, "checkpoints": rows}


def inspect_run_text(found: dict[str, Any]) -> str:
    """Formats the result of `inspect_run`, one line per checkpoint."""
    lines = [f"{'step':>10} {found['best_metric']:>24} {'MiB':>9}"]
    for row in found["checkpoints"]:
        value = "not evaluated" if row["value"] is None else f"{row['value']:.6g}"
        marks = [mark for mark in ("newest", "best") if row[mark]] + [row["damage"]]
        text = f"{row['step']:>10} {value:>24} {row['bytes'] / 2**20:>9.1f}  {' '.join(marks)}"
        lines.append(text.rstrip())
    return "\n".join(lines)
