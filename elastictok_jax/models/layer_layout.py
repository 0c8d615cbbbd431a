"""Two layouts of the layers of encoder and decoder, and the way from one to the other.

Stacked (model.scan_layers): one subtree "layers", whose arrays have a leading axis of layers.
Apart: subtrees "layers_0", "layers_1", ...

What stacking means is up to the caller: arrays, shapes, or weights boxed with axis names.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

STACKED, APART = "layers", "layers_"
HALVES = ("encoder", "decoder")


def is_stacked(params) -> bool:
    """Whether a tree of parameters is in the stacked layout."""
    return any(STACKED in _half(params, half) for half in HALVES)


def depths(params) -> dict[str, int]:
    """How many layers each half of a tree of parameters has, in either layout."""
    return {half: _depth(_half(params, half)) for half in HALVES}


def _half(params, half: str) -> dict[str, Any]:
    tree = params.get(half)
    return tree if isinstance(tree, dict) else {}


def _depth(half: dict[str, Any]) -> int:
    if STACKED in half:
        return min((leaf.shape[0] for leaf in jax.tree.leaves(half[STACKED])), default=0)
    return next(index for index in itertools.count() if f"{APART}{index}" not in half)


def with_layout(
    params,
    *,
    stacked: bool,
    stack: Callable[[Sequence[Any]], Any] = np.stack,
    unstack: Callable[[Any], Sequence[Any]] = list,
    is_leaf: Callable[[Any], bool] | None = None,
):
    """`params` in the stacked layout or the other; as they are, if that is theirs.

    Args:
      stack, unstack: one leaf of all layers from those of each, in order, and the reverse.
    """
    if is_stacked(params) == stacked:
        return params
    change = _stack_half if stacked else _unstack_half
    convert = stack if stacked else unstack
    return {
        name: change(half, convert, is_leaf) if _depth(_half(params, name)) else half
        for name, half in params.items()
    }


def _stack_half(half, stack, is_leaf):
    layers = [half[f"{APART}{index}"] for index in range(_depth(half))]
    numbered = {f"{APART}{index}" for index in range(len(layers))}
    rest = {name: tree for name, tree in half.items() if name not in numbered}
    stacked = jax.tree.map(lambda *leaves: stack(leaves), *layers, is_leaf=is_leaf)
    return rest | {STACKED: stacked}


def _unstack_half(half, unstack, is_leaf):
    rest = {name: tree for name, tree in half.items() if name != STACKED}
    leaves, structure = jax.tree.flatten(half[STACKED], is_leaf=is_leaf)
    layers = zip(*map(unstack, leaves), strict=True)
    return rest | {
        f"{APART}{index}": jax.tree.unflatten(structure, layer)
        for index, layer in enumerate(layers)
    }
