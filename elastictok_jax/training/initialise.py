"""Initialises a new run with those weights of another one that fit (train.init_from).

Weights are matched by name and shape alone, so the next stage may have a longer context or another
resolution, rotary base or bottleneck. If encoder or decoder have another number of layers, layer i
is matched with layer i.
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from elastictok_jax.errors import UsageError
from elastictok_jax.layers.scan_layout import (
    STACKED,
    UNSTACKED,
    is_stacked,
    layer_counts,
    relayout,
    relayout_shapes,
    stacked_struct,
)
from elastictok_jax.models.open_model import SavedModel, open_model
from elastictok_jax.parallel.distributed import FIRST_SECONDS, broadcast_from_first
from elastictok_jax.paths import local_text
from elastictok_jax.training.state import TrainState

RECORD = "init_from.json"
Flat = dict[tuple[str, ...], Any]


class WeightMatch(NamedTuple):
    """The weights that are taken, skipped and re-initialised.

    Attributes:
      taken: names of weights with the same shape in both.
      skipped: name -> shape, of saved weights that the model does not have.
      reinitialised: name -> (shape saved or None, shape in the model).
    """

    taken: list[str]
    skipped: dict[str, tuple[int, ...]]
    reinitialised: dict[str, tuple[tuple[int, ...] | None, tuple[int, ...]]]

    def differences(self) -> list[str]:
        """Returns a phrase for every weight that is not taken, with both shapes."""
        return [
            *(
                f"{name}: {'none' if saved is None else saved} saved, {wanted} asked for"
                for name, (saved, wanted) in self.reinitialised.items()
            ),
            *(f"{name}: {saved} saved, none asked for" for name, saved in self.skipped.items()),
        ]


def initialise(
    state: TrainState, abstract: TrainState, *, config: ml_collections.ConfigDict, workdir: Path
) -> tuple[TrainState, list[str]]:
    """Returns a fresh state with the weights of `config.train.init_from`, and lines for the log.

    Only the first parameter group takes weights; other groups keep their initial ones. The
    optimizer state is fresh, and an average of the weights starts at the weights taken. Writes
    which weights were taken, skipped and re-initialised to `workdir/init_from.json`. Weights of
    `state` that are replaced are freed first.

    Raises:
      UsageError: if there are no weights; if no weight fits; or, naming every weight that differs
        with both shapes, if train.init_from_mismatch is "refuse".
    """
    group = next(iter(abstract.params))  # the one that is exported, so other runs have it
    wanted_params = abstract.params[group]
    stacked = is_stacked(wanted_params)
    with _open_initial_weights(config.train.init_from) as source:
        layout = is_stacked(source.shapes)
        if layer_counts(source.shapes) != layer_counts(wanted_params):
            layout = False  # compared layer by layer
        wanted = flatten_dict(relayout_shapes(wanted_params, stacked=layout))
        plan = _match_weights(
            flatten_dict(_shapes_in_layout(source.shapes, stacked=layout)), wanted
        )
        differences = plan.differences()
        if differences and (config.train.init_from_mismatch == "refuse" or not plan.taken):
            fix = (
                "set train.init_from_mismatch=reinitialise to re-initialise those weights"
                if plan.taken
                else "leave train.init_from empty (no weight fits, so nothing would be taken)"
            )
            raise UsageError(
                f"train.init_from = {config.train.init_from} does not fit the config: "
                f"{'; '.join(differences)}. Use the config it was trained with, or {fix}"
            )
        taken = {key: wanted[key] for key in wanted if "/".join(key) in plan.taken}
        _free(state.ema_params.get(group))
        params = flatten_dict(relayout(state.params[group], stacked=layout))
        _free([params[key] for key in taken])
        params |= _read(source, taken, stacked=layout)
    params = relayout(unflatten_dict(params), stacked=stacked)
    ema_params = state.ema_params
    if group in ema_params:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, wanted_params)
        copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=shardings)
        ema_params = ema_params | {group: copy(params)}
    _record_initialisation(plan, source.origin, path=workdir / RECORD)
    summary = (
        f"weights of {source.origin}: {len(plan.taken)} taken, {len(plan.reinitialised)} "
        f"re-initialised, {len(plan.skipped)} skipped (all in {RECORD})"
    )
    state = dataclasses.replace(state, params=state.params | {group: params}, ema_params=ema_params)
    return state, [
        summary,
        *(f"  not taken: {d}" for d in differences),
    ]


def _match_weights(saved: Flat, wanted: Flat) -> WeightMatch:
    """Compares two flat dicts of arrays or shape structs by name and shape."""
    old = {"/".join(key): tuple(leaf.shape) for key, leaf in saved.items()}
    new = {"/".join(key): tuple(leaf.shape) for key, leaf in wanted.items()}
    taken = sorted(name for name in new if old.get(name) == new[name])
    return WeightMatch(
        taken=taken,
        skipped={name: old[name] for name in sorted(old.keys() - new.keys())},
        reinitialised={
            name: (old.get(name), new[name]) for name in sorted(new.keys() - set(taken))
        },
    )


def _record_initialisation(plan: WeightMatch, origin: str, *, path: Path) -> None:
    """Writes which weights were taken, skipped and re-initialised as JSON; process 0 only."""
    if jax.process_index() == 0:
        shapes = {
            name: {"saved": saved, "model": wanted}
            for name, (saved, wanted) in plan.reinitialised.items()
        }
        values = {"from": origin, **plan._asdict(), "reinitialised": shapes}
        path.write_text(json.dumps(values, indent=1) + "\n")


@contextlib.contextmanager
def _open_initial_weights(model: str) -> Iterator[SavedModel]:
    """Opens the weights of train.init_from; process 0 chooses the checkpoint for all processes.

    Raises:
      UsageError: if there is no such model or checkpoint, or it is damaged.
    """
    agree = functools.partial(broadcast_from_first, "init_from", timeout=FIRST_SECONDS)
    with contextlib.ExitStack() as stack:
        try:
            saved = stack.enter_context(open_model(local_text(model), agree=agree))
        except UsageError as error:
            raise UsageError(f"train.init_from = {model}: {error}") from None
        yield saved


def _read(source: SavedModel, taken: Flat, *, stacked: bool) -> Flat:
    """Reads the weights `taken`, whose names are those of the layout asked for."""
    if is_stacked(source.shapes) == stacked:
        return flatten_dict(source.read(unflatten_dict(taken)))
    count = layer_counts(source.shapes)
    wanted = {}  # in the layout of the source
    for key in flatten_dict(source.shapes):
        if STACKED not in key:
            if key in taken:
                wanted[key] = taken[key]
            continue
        at = key.index(STACKED)
        first = (*key[:at], f"{UNSTACKED}0", *key[at + 1 :])
        if first in taken:
            wanted[key] = stacked_struct(taken[first], count[key[:at]])
    found = relayout(source.read(unflatten_dict(wanted)), stacked=False)
    return {key: array for key, array in flatten_dict(found).items() if key in taken}


def _shapes_in_layout(shapes, *, stacked: bool):
    """Converts a tree of shapes to ShapeDtypeStructs in the layout asked for."""
    structs = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, np.float32), shapes)
    return relayout_shapes(structs, stacked=stacked)


def _free(tree) -> None:
    for leaf in jax.tree.leaves(tree):
        leaf.delete()
