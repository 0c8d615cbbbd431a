"""Saves and restores Orbax checkpoints of a training run; the only module that imports orbax.

A checkpoint is a Composite of `state` (the train state), `data` (position in the data) and
`meta` (resolved config and library versions). It is written in the background under a temporary
name and renamed when complete, so a killed process never leaves a partial checkpoint.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import inspect
import itertools
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import ml_collections
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from elastictok_jax import __version__
from elastictok_jax.errors import RunError, UsageError, first_line
from elastictok_jax.layers.scan_layout import is_stacked, relayout, relayout_shapes
from elastictok_jax.storage.references import BEST

T = TypeVar("T")
LIBRARIES = ("jax", "flax", "optax", "orbax-checkpoint")
# What follows these in tensorstore's errors is for its developers.
DETAILS = (". See full TensorStore details", " [tensorstore_spec", " [source locations")


class DamagedCheckpoint(UsageError):
    """A checkpoint that exists but cannot be read."""


@dataclasses.dataclass(frozen=True)
class BestMetric:
    """The metric that decides which of two checkpoints is better.

    Attributes:
      name: as in metrics.jsonl.
      lower: whether lower values are better.
    """

    name: str
    lower: bool

    @property
    def sign(self) -> float:
        """The factor that makes the lowest value the best."""
        return 1.0 if self.lower else -1.0


LOWEST_MSE = BestMetric("eval/mse", lower=True)


class Checkpointer:
    """Saves, keeps and restores the checkpoints in `workdir/checkpoints`.

    It keeps the newest `keep_last`, and the `keep_best` with the best metric.
    """

    def __init__(
        self, workdir: Path, *, keep_last: int, keep_best: int, best: BestMetric = LOWEST_MSE
    ):
        def cost(metrics: dict[str, float] | None) -> float:
            if best.name not in (metrics or {}):
                return math.inf  # not every checkpoint is evaluated
            return best.sign * (metrics or {})[best.name]

        policy = preservation_policy.AnyPreservationPolicy(
            [
                preservation_policy.LatestN(keep_last),
                preservation_policy.BestN(
                    get_metric_fn=cost,
                    reverse=True,  # the last in descending order is kept: the lowest cost
                    n=keep_best,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        self._open(
            workdir,
            preservation_policy=policy,
            best_fn=cost,  # without it, metrics are not saved, and a resumed run has none
            best_mode="min",
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )

    @classmethod
    def for_reading(cls, workdir: Path) -> "Checkpointer":
        """Opens checkpoints read-only, so that a run that is writing there is not disturbed."""
        reader = cls.__new__(cls)
        log = logging.getLogger("absl")
        level = log.level
        log.setLevel(logging.ERROR)  # orbax warns that read-only means read-only
        try:
            reader._open(workdir, read_only=True)
        finally:
            log.setLevel(level)
        return reader

    def _open(self, workdir: Path, **options: Any) -> None:
        _ignore_late_answers()
        self.folder = workdir / "checkpoints"
        self._manager = ocp.CheckpointManager(
            self.folder.absolute(), options=ocp.CheckpointManagerOptions(**options)
        )

    def steps(self) -> list[int]:
        """Returns the steps of the checkpoints on disk, newest first; some may be damaged."""
        return saved_steps(self.folder)

    def latest_step(self) -> int | None:
        """Returns the step of the newest checkpoint on disk, or None."""
        return next(iter(self.steps()), None)

    def best_steps(self, best: BestMetric) -> list[int]:
        """Returns the steps of the checkpoints that were evaluated, best first."""
        values = {step: self.metrics(step).get(best.name) for step in self.steps()}
        known = {step: value for step, value in values.items() if value is not None}
        return sorted(known, key=lambda step: best.sign * known[step])

    def choose(self, which: int | str | None, *, best: BestMetric) -> list[int]:
        """Returns the steps that a reference selects (see `references`); None selects all, newest
        first.

        Raises:
          UsageError: if it selects none.
        """
        steps = self.steps()
        if not steps:
            raise UsageError(
                f"model {self.folder.parent} has no complete checkpoint yet: train it further"
            )
        if which is None:
            return steps
        if which == BEST:
            chosen = self.best_steps(best)[:1]
            if not chosen:
                raise UsageError(
                    f"no checkpoint in {self.folder} was saved with {best.name}: name a step, "
                    f"of {', '.join(map(str, steps))}"
                )
            return chosen
        if which not in steps:
            raise UsageError(
                f"{self.folder} has no step {which}: choose one of {', '.join(map(str, steps))}, "
                f"or {BEST}"
            )
        return [int(which)]

    def first_readable(self, steps: list[int], read: Callable[[int], T]) -> tuple[int, T]:
        """Returns the first of `steps` that `read` can read, and the result of `read`.

        A note on stderr names each damaged one before it.

        Raises:
          DamagedCheckpoint: if none can be read.
        """
        damaged: list[str] = []
        for step in steps:
            try:
                found = read(step)
            except DamagedCheckpoint as error:
                damaged.append(str(error))
                continue
            for line in damaged:
                print(f"note: {line}: step {step} is read instead", file=sys.stderr)
            return step, found
        raise DamagedCheckpoint("; ".join(damaged))

    def metrics(self, step: int) -> dict[str, float]:
        """Returns the metrics saved with a checkpoint; {} if none can be read."""
        try:
            metrics = json.loads((self.folder / str(step) / "metrics" / "metrics").read_bytes())
        except (OSError, ValueError):
            return {}
        numbers = metrics.items() if isinstance(metrics, dict) else ()
        return {name: float(x) for name, x in numbers if isinstance(x, int | float)}

    def size(self, step: int) -> int:
        """Returns the bytes of a checkpoint on disk."""
        files = (path for path in (self.folder / str(step)).rglob("*") if path.is_file())
        return sum(path.stat().st_size for path in files)

    def set_aside(self, step: int) -> Path:
        """Moves a damaged checkpoint away, so that its step can be saved again.

        Every process that sees the damage may call this; the first one moves it.
        """
        for number in itertools.count():
            aside = self.folder.with_name("damaged") / f"{step}-{number}"
            if not aside.exists():
                break
        aside.parent.mkdir(exist_ok=True)
        try:
            os.rename(self.folder / str(step), aside)
        except FileNotFoundError:
            aside = aside.parent
        self._manager.reload()
        return aside

    def save(
        self,
        step: int,
        state: Any,
        *,
        data_position: dict[str, Any],
        config: ml_collections.ConfigDict,
        metrics: dict[str, float] | None,
    ) -> None:
        """Starts writing a checkpoint; the state may be donated as soon as this returns.

        Raises:
          RunError: if this save, or the one before it, could not be written.
        """
        versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
        versions["elastictok_jax"] = __version__
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(state),
                    data=ocp.args.JsonSave(data_position),
                    meta=ocp.args.JsonSave(
                        {"config": json.loads(config.to_json_best_effort()), "versions": versions}
                    ),
                ),
                metrics=metrics or {},
            )
        except Exception as error:
            raise self._failed(error) from error

    def raise_if_failed(self) -> None:
        """Checks without waiting whether the write in the background has failed.

        Raises:
          RunError: if it could not be written.
        """
        try:
            self._manager.check_for_errors()
        except Exception as error:
            raise self._failed(error) from error

    def restore(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
        """Returns the state at `step`, placed as `abstract` says, and the data position.

        The mesh, the number of processes, the kind of device and the layout of layers may differ
        from those at the save.

        Raises:
          UsageError: naming every weight that differs, with both shapes.
          DamagedCheckpoint: if it cannot be read.
        """
        saved = self._saved(step)
        group = _before_groups(abstract, saved["params"])
        with self._reading(step):
            grouped = abstract if group is None else _of_group(abstract, group)
            wanted = relayout_shapes(grouped, stacked=is_stacked(saved["params"]))
        self._check_shapes(step, shape_mismatches(saved, wanted))
        with self._reading(step):
            restored = self._restore(step, wanted, data=ocp.args.JsonRestore())
            position = dict(restored["data"])
        state = relayout(restored["state"], stacked=is_stacked(abstract.params))
        return state if group is None else _as_group(state, group), position

    def saved_params(self, step: int, group: str) -> dict[str, Any]:
        """Returns shapes of the weights to evaluate of a parameter group, the average if there is
        one, as a tree with layers stacked or not as they were saved."""
        params = self._saved(step)[self._evaluated(step)]
        return params.get(group, params)  # saved before states had groups

    def restore_params(self, step: int, group: str, abstract_params: Any) -> Any:
        """Returns the weights to evaluate of a group, placed as `abstract_params` says.

        Raises:
          UsageError: naming every weight that differs, with both shapes.
        """
        saved = self.saved_params(step, group)
        wanted = relayout_shapes(abstract_params, stacked=is_stacked(saved))
        self._check_shapes(step, shape_mismatches(saved, wanted))
        params = self.restore_some_params(step, group, wanted)
        return relayout(params, stacked=is_stacked(abstract_params))

    def restore_some_params(self, step: int, group: str, abstract_params: Any) -> Any:
        """Returns only those weights to evaluate of a group that `abstract_params` has.

        Its names, shapes and layout must be those that were saved.
        """
        name = self._evaluated(step)
        grouped = group in self._saved(step)[name]
        wanted = {group: abstract_params} if grouped else abstract_params
        with self._reading(step):
            params = self._restore(step, {name: wanted}, partial=True)["state"][name]
        return params[group] if grouped else params

    def _restore(self, step: int, wanted: Any, *, partial: bool = False, **items: Any) -> Any:
        """Restores `items` and the state as `wanted` places it, only its leaves if `partial`."""
        state = ocp.args.PyTreeRestore(
            item=wanted,
            restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
            partial_restore=partial,
        )
        return self._manager.restore(step, args=ocp.args.Composite(state=state, **items))

    def finish(self) -> None:
        """Waits until the last save is on disk.

        Raises:
          RunError: if it could not be written.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failed(error) from error

    def close(self) -> None:
        self._manager.close()

    def _failed(self, error: Exception) -> RunError:
        step = self.latest_step()
        kept = "there is no earlier one" if step is None else f"step {step} is kept"
        reason = first_line(error, until=DETAILS)
        return RunError(
            f"a checkpoint could not be written to {self.folder} ({reason}): {kept}; "
            "free space or repair the disk, then run the same command again"
        )

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Converts errors that orbax raises inside, for damage, to DamagedCheckpoint."""
        try:
            yield
        except (UsageError, MemoryError, PermissionError, jax.errors.JaxRuntimeError):
            raise  # not caused by what is on disk
        except Exception as error:  # orbax and tensorstore raise all kinds
            reason = first_line(error, until=DETAILS)
            raise DamagedCheckpoint(
                f"checkpoint {self.folder / str(step)} is damaged ({reason})"
            ) from error

    def _saved(self, step: int) -> Any:
        with self._reading(step):
            metadata = ocp.PyTreeCheckpointHandler().metadata(
                self.folder.absolute() / str(step) / "state"
            )
            tree = metadata.tree
            if not tree["params"]:
                raise ValueError("it names no weights")
            return tree

    def _evaluated(self, step: int) -> str:
        return "ema_params" if self._saved(step)["ema_params"] else "params"

    def _check_shapes(self, step: int, wrong: list[str]) -> None:
        if wrong:
            raise UsageError(
                f"checkpoint {self.folder / str(step)} does not fit the config: {'; '.join(wrong)}"
                ". Use the config it was trained with, or another --workdir"
            )


@functools.cache
def _ignore_late_answers() -> None:
    """Drops tracebacks that follow the first failure to read or write, which is raised.

    That failure ends orbax's event loop; each array that tensorstore's threads or orbax's tasks
    still finish afterwards would print another one.
    """
    before = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        closed = str(unraisable.exc_value) == "Event loop is closed"
        task = unraisable.object
        is_orbax = inspect.iscoroutine(task) and "orbax" in task.cr_code.co_filename
        if not (closed or is_orbax):
            before(unraisable)

    sys.unraisablehook = hook
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)


def saved_steps(folder: Path) -> list[int]:
    """Returns the steps of the checkpoints in a folder, newest first; some may be damaged."""
    try:
        names = [path.name for path in folder.iterdir() if path.is_dir()]
    except OSError:
        return []
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def _before_groups(abstract: Any, saved_params: Mapping[str, Any]) -> str | None:
    """Returns the parameter group of a state that was saved before states had groups, or None."""
    groups = tuple(abstract.params)
    return groups[0] if len(groups) == 1 and groups[0] not in saved_params else None


def _of_group(state: Any, group: str) -> Any:
    """Returns a state whose trees are those of one group, as it was saved before groups."""
    return dataclasses.replace(
        state,
        params=state.params[group],
        opt_state=state.opt_state[group],
        ema_params=state.ema_params.get(group),
    )


def _as_group(state: Any, group: str) -> Any:
    """Returns the reverse of `_of_group`."""
    return dataclasses.replace(
        state,
        params={group: state.params},
        opt_state={group: state.opt_state},
        ema_params={} if state.ema_params is None else {group: state.ema_params},
    )


def shape_mismatches(saved: Any, wanted: Any) -> list[str]:
    """Lists every weight that is missing, extra or of another shape, with both shapes."""
    old, new = _flat_shapes(saved), _flat_shapes(wanted)
    return [
        f"{name}: {old.get(name, 'none')} saved, {new.get(name, 'none')} asked for"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def _flat_shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path): (
            tuple(leaf.shape)
        )
        for path, leaf in leaves
        if hasattr(leaf, "shape")
    }
