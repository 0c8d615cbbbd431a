"""Converts parameters between the two layouts of repeated layers.

Stacked (config key `scan_layers`): a subtree "layers" whose arrays have a leading axis of layers.
Unstacked: subtrees "layers_0", "layers_1", ... Any dict of any tree may hold such layers, so the
same functions convert parameters, optimizer moments and whole train states of every model family.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

STACKED, UNSTACKED = "layers", "layers_"
Path = tuple[str, ...]


def is_stacked(params) -> bool:
    """Returns whether any layers of a tree are in the stacked layout."""
    return any(stacked for stacked, _ in _layers(params).values())


def layer_counts(params) -> dict[Path, int]:
    """Returns the number of layers below each path that has some, in either layout."""
    return {path: depth for path, (_, depth) in _layers(params).items()}


def _layers(tree, path: Path = ()) -> dict[Path, tuple[bool, int]]:
    if not isinstance(tree, Mapping):
        return {}
    found = {}
    if isinstance(tree.get(STACKED), Mapping):
        leaves = jax.tree.leaves(tree[STACKED])
        found[path] = (True, min((leaf.shape[0] for leaf in leaves), default=0))
    elif f"{UNSTACKED}0" in tree:
        found[path] = (False, _count(tree))
    for name, child in tree.items():
        if path not in found or not name.startswith(STACKED):
            found |= _layers(child, (*path, name))
    return found


def _count(tree: Mapping[str, Any]) -> int:
    return next(index for index in itertools.count() if f"{UNSTACKED}{index}" not in tree)


def stack_or_unstack(
    tree,
    *,
    stacked: bool,
    stack: Callable[[Sequence[Any]], Any] = np.stack,
    unstack: Callable[[Any], Sequence[Any]] = list,
    is_leaf: Callable[[Any], bool] | None = None,
):
    """Returns `tree` with all layers stacked or all unstacked.

    Args:
      stack: makes one leaf of all layers from those of each, in order; `unstack` is the reverse.
      is_leaf: as in jax.tree.map, for leaves that are trees themselves.
    """

    def convert(node):
        if not isinstance(node, dict):
            return node
        if stacked and f"{UNSTACKED}0" in node:
            names = [f"{UNSTACKED}{index}" for index in range(_count(node))]
            layers = [node[name] for name in names]
            rest = {name: each(child) for name, child in node.items() if name not in names}
            return rest | {STACKED: jax.tree.map(lambda *x: stack(x), *layers, is_leaf=is_leaf)}
        if not stacked and isinstance(node.get(STACKED), dict):
            rest = {name: each(child) for name, child in node.items() if name != STACKED}
            leaves, structure = jax.tree.flatten(node[STACKED], is_leaf=is_leaf)
            columns = zip(*map(unstack, leaves), strict=True)
            return rest | {
                f"{UNSTACKED}{index}": jax.tree.unflatten(structure, layer)
                for index, layer in enumerate(columns)
            }
        return {name: each(child) for name, child in node.items()}

    def stops(node) -> bool:
        return isinstance(node, dict) or (is_leaf is not None and is_leaf(node))

    def each(node):
        return jax.tree.map(convert, node, is_leaf=stops)

    return each(tree)


def relayout_shapes(abstract, *, stacked: bool):
    """Returns the ShapeDtypeStructs of `abstract`, shardings included, in the layout asked for."""
    return stack_or_unstack(abstract, stacked=stacked, stack=_box, unstack=_unbox)


def relayout(tree, *, stacked: bool):
    """Returns the arrays of `tree` in the layout asked for.

    Arrays of the other layout are freed one weight at a time, so at most one weight of all layers
    is held twice.
    """
    return stack_or_unstack(tree, stacked=stacked, stack=_stack, unstack=_unstack)


def stacked_struct(layer: jax.ShapeDtypeStruct, count: int) -> jax.ShapeDtypeStruct:
    """Returns the weight of `count` layers, given that of one."""
    sharding = _stacked_sharding(layer.sharding)
    return jax.ShapeDtypeStruct((count, *layer.shape), layer.dtype, sharding=sharding)


def _box(layers: Sequence[jax.ShapeDtypeStruct]) -> jax.ShapeDtypeStruct:
    return stacked_struct(layers[0], len(layers))


def _unbox(weight: jax.ShapeDtypeStruct) -> list[jax.ShapeDtypeStruct]:
    count, *shape = weight.shape
    sharding = _layer_sharding(weight.sharding)
    return [jax.ShapeDtypeStruct(shape, weight.dtype, sharding=sharding)] * count


def _stack(layers: Sequence[jax.Array]) -> jax.Array:
    weight = _stacker(_stacked_sharding(layers[0].sharding))(layers)
    for layer in layers:
        layer.delete()
    return weight


def _unstack(weight: jax.Array) -> list[jax.Array]:
    layers = _unstacker(_layer_sharding(weight.sharding))(weight)
    weight.delete()
    return layers


@functools.cache  # so that weights of one shape share a compiled program
def _stacker(sharding: Sharding):
    return jax.jit(jnp.stack, out_shardings=sharding)


@functools.cache
def _unstacker(sharding: Sharding):
    return jax.jit(list, out_shardings=sharding)


def _stacked_sharding(sharding: Sharding | None) -> Sharding | None:
    """Returns the sharding of all layers, given that of one: the axis of layers is never cut."""
    if not isinstance(sharding, NamedSharding):
        return sharding  # of a single device, or none
    return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))


def _layer_sharding(sharding: Sharding | None) -> Sharding | None:
    if not isinstance(sharding, NamedSharding):
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
