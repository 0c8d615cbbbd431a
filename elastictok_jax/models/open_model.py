"""Opens a saved model: a training workdir (RUN, RUN@STEP, RUN@best) or an exported folder."""

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import jax
import ml_collections
import numpy as np

from elastictok_jax.config import read_config
from elastictok_jax.errors import UsageError
from elastictok_jax.layers.scan_layout import is_stacked, relayout_shapes, stack_or_unstack
from elastictok_jax.models.base import Family
from elastictok_jax.models.registry import family_of_config
from elastictok_jax.storage.checkpoint import BestMetric, Checkpointer, shape_mismatches
from elastictok_jax.storage.references import split_reference
from elastictok_jax.storage.safetensors import load_safetensors

WEIGHTS = "model.safetensors"


class SavedModel(Protocol):
    """A saved model that is open for reading.

    Attributes:
      folder: the workdir or exported folder.
      config: the config it was trained with; family: what that describes.
      shapes: the tree of the weights as saved; leaves have `.shape`.
      origin: where the weights that were read come from, in words.
      is_newest: whether these are the newest of the folder.
    """

    folder: Path
    config: ml_collections.ConfigDict
    family: Family
    origin: str
    is_newest: bool

    @property
    def shapes(self) -> Any: ...

    def read(self, wanted: Any) -> Any:
        """Returns the weights that `wanted` has: a tree of ShapeDtypeStructs with shardings whose
        names and shapes are those of `shapes`."""
        ...

    def params(self) -> Any:
        """Returns all weights, in the layout of the config.

        Raises:
          UsageError: naming every weight that does not fit the config, with both shapes.
        """
        ...


def best_metric(config: ml_collections.ConfigDict, family: Family) -> BestMetric:
    """Returns the metric by which the best checkpoint of a run is chosen."""
    name = config.train.best_metric
    return BestMetric(name, family.task.better.get(name.removeprefix("eval/")) != "higher")


def is_exported_model(folder: Path) -> bool:
    """Returns whether a folder holds exported weights."""
    return (folder / WEIGHTS).is_file()


@contextlib.contextmanager
def open_model(
    model: str | os.PathLike,
    *,
    step: int | str | None = None,
    agree: Callable[[str], str] = lambda chosen: chosen,
) -> Iterator[SavedModel]:
    """Opens a model for reading while inside.

    Of a workdir the newest checkpoint is read; if it is damaged, the one before, with a note on
    stderr.

    Args:
      model: a path, PATH@STEP or PATH@best.
      step: of the checkpoint, or "best", in place of what `model` says.
      agree: returns in every process the text that the first one gives, so that all read the same
        checkpoint.

    Raises:
      UsageError: if there is no such model or checkpoint, or it is damaged.
    """
    folder, which = split_reference(model)
    which = which if step is None else step
    if not folder.is_dir():
        raise UsageError(f"model {model} does not exist: give a workdir or an exported folder")
    config = read_config(folder / "config.json")
    family = family_of_config(config)
    if is_exported_model(folder):
        if which is not None:
            raise UsageError(f"model {folder} is exported, and has no checkpoints to choose from")
        yield _Exported(folder, config, family)
        return
    if not (folder / "checkpoints").is_dir():
        raise UsageError(f"model {model} has no checkpoints yet: train it first")
    checkpoints = Checkpointer.for_reading(folder)
    try:
        chosen = checkpoints.choose(which, best=best_metric(config, family))
        steps = json.loads(agree(json.dumps(chosen)))
        yield _Workdir(folder, config, family, checkpoints=checkpoints, steps=steps)
    finally:
        checkpoints.close()


class _Exported:
    def __init__(self, folder: Path, config: ml_collections.ConfigDict, family: Family) -> None:
        self.folder, self.config, self.family = folder, config, family
        self.origin, self.is_newest = str(folder), True

    @functools.cached_property
    def shapes(self) -> Any:
        return load_safetensors(self.folder / WEIGHTS)[0]

    def read(self, wanted: Any) -> Any:
        return jax.tree.map(
            lambda like, array: _place(array, like), wanted, _at(self.shapes, wanted)
        )

    def params(self) -> Any:
        abstract = self.family.codec.params_shapes()
        wanted = relayout_shapes(abstract, stacked=is_stacked(self.shapes))
        wrong = shape_mismatches(self.shapes, wanted)
        if wrong:
            weights = self.folder / WEIGHTS
            raise UsageError(f"{weights} does not fit its config.json: {'; '.join(wrong)}")
        return stack_or_unstack(self.shapes, stacked=is_stacked(abstract))


class _Workdir:
    def __init__(
        self,
        folder: Path,
        config: ml_collections.ConfigDict,
        family: Family,
        *,
        checkpoints: Checkpointer,
        steps: list[int],
    ) -> None:
        self.folder, self.config, self.family = folder, config, family
        self._checkpoints, self._steps = checkpoints, steps
        self._group = family.task.groups[0]

    def _first_readable(self, read: Callable[[int], Any]) -> Any:
        self._step, found = self._checkpoints.first_readable(self._steps, read)
        self.origin = f"{self.folder} at step {self._step}"
        self.is_newest = self._step == self._checkpoints.latest_step()
        return found

    @functools.cached_property
    def shapes(self) -> Any:
        return self._first_readable(lambda step: self._checkpoints.saved_params(step, self._group))

    def read(self, wanted: Any) -> Any:
        assert self.shapes  # of the checkpoint that is read
        return self._checkpoints.restore_some_params(self._step, self._group, wanted)

    def params(self) -> Any:
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        placed = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
            self.family.codec.params_shapes(),
        )
        return self._first_readable(
            lambda step: self._checkpoints.restore_params(step, self._group, placed)
        )


def _at(tree: Any, wanted: Any) -> Any:
    """Returns those leaves of a nested dict that `wanted` has."""
    if not isinstance(wanted, dict):
        return tree
    return {name: _at(tree[name], child) for name, child in wanted.items()}


def _place(array: np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
    values = array.astype(like.dtype)
    return jax.make_array_from_callback(like.shape, like.sharding, lambda index: values[index])
