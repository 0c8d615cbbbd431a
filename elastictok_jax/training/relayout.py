"""Stacked layers to layers apart and back, for sharded arrays on devices and for their shapes.

Works on parameters alone and on whole train states: optimizer moments and averages have the tree
of the parameters within them. See `models.layer_layout` for the two layouts.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from elastictok_jax.models.layer_layout import HALVES, with_layout


def relayout_shapes(abstract, *, stacked: bool):
    """ShapeDtypeStructs of `abstract`, shardings and all, in the layout asked for."""
    return _each_params(
        abstract, lambda params: with_layout(params, stacked=stacked, stack=_box, unstack=_unbox)
    )


def relayout(tree, *, stacked: bool):
    """Arrays in the layout asked for. Those of the other are freed on the way, one weight after
    the other, so that no more than one weight of all layers is held twice."""
    return _each_params(
        tree, lambda params: with_layout(params, stacked=stacked, stack=_stack, unstack=_unstack)
    )


def _each_params(tree, change: Callable[[Any], Any]):
    def is_params(node) -> bool:
        return isinstance(node, dict) and any(half in node for half in HALVES)

    return jax.tree.map(
        lambda node: change(node) if is_params(node) else node, tree, is_leaf=is_params
    )


def stacked_struct(layer: jax.ShapeDtypeStruct, count: int) -> jax.ShapeDtypeStruct:
    """The weight of `count` layers, given that of one."""
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
    """Layers themselves are never cut."""
    if not isinstance(sharding, NamedSharding):
        return sharding  # of a single device, or none
    return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))


def _layer_sharding(sharding: Sharding | None) -> Sharding | None:
    if not isinstance(sharding, NamedSharding):
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
