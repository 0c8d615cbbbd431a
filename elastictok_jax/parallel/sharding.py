"""One table from the logical axes that models name to the axes of the mesh."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Weights are cut over `sequence` too: it holds most devices of a long context, and would else
# multiply the memory of weights and moments (paper, section 3.3: fully sharded, ring attention).
LOGICAL_AXIS_RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    ("batch", ("data", "fsdp")),
    ("sequence", "sequence"),
    ("embed", ("fsdp", "sequence")),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("layers", None),
    ("head_width", None),
    ("patch", None),
    ("latent", None),
    ("norm", None),
)
WEIGHT_AXES = {"fsdp", "sequence"}  # of `embed`
MEBIBYTE = 2**20


def param_specs(boxed_params, sizes: Mapping[str, int]):
    """PartitionSpecs of a tree of parameters boxed with logical axis names.

    An axis that the mesh axes of its rule do not divide together is cut over the first of them
    that do: a width of 24 on fsdp 4 x sequence 4 is cut over fsdp alone.

    Args:
      sizes: of the mesh axes.
    """
    rules = dict(LOGICAL_AXIS_RULES)

    def cut(name: str | None, size: int) -> str | tuple[str, ...] | None:
        rule = rules[name] if name else None
        axes = (rule,) if isinstance(rule, str) else rule or ()
        while axes and size % math.prod(sizes[axis] for axis in axes):
            axes = axes[:-1]
        return axes if len(axes) > 1 else axes[0] if axes else None

    def spec(leaf: nn.Partitioned) -> PartitionSpec:
        return PartitionSpec(*map(cut, leaf.names, leaf.value.shape))

    return jax.tree.map(spec, boxed_params, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))


def param_shardings(boxed_params, mesh: Mesh):
    """NamedShardings of a tree of parameters boxed with logical axis names."""
    specs = param_specs(boxed_params, mesh.shape)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of [B, S, ...] batches: rows over data and fsdp, tokens over sequence."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "sequence"))


def replicated(mesh: Mesh) -> NamedSharding:
    """One whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def replicate(tree, mesh: Mesh):
    """Arrays that every process has, as one whole copy on every device."""
    whole = replicated(mesh)
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, whole, lambda index: x[index]), tree
    )


class Whole(NamedTuple):
    """An array of which every device holds all."""

    name: str
    shape: tuple[int, ...]
    mebibytes: float


def left_whole(abstract, *, above_mebibytes: float = 1.0) -> list[Whole]:
    """What of a tree of ShapeDtypeStructs with shardings is replicated, the largest first.

    Arrays up to `above_mebibytes` are left out, and so is all of a mesh of one device.
    """
    found = [
        Whole(name, leaf.shape, leaf.size * leaf.dtype.itemsize / MEBIBYTE)
        for name, leaf in _named(abstract)
        if leaf.sharding.num_devices > 1 and leaf.sharding.is_fully_replicated
    ]
    large = [array for array in found if array.mebibytes > above_mebibytes]
    return sorted(large, key=lambda array: (-array.mebibytes, array.name))


def sharding_notes(abstract) -> list[str]:
    """Lines on what of a state takes more memory than it has to, for the log of a run."""
    leaves = _named(abstract)
    mesh = leaves[0][1].sharding.mesh
    if mesh.size == 1:
        return []
    if all(leaf.sharding.is_fully_replicated for _, leaf in leaves):
        total = sum(leaf.size * leaf.dtype.itemsize for _, leaf in leaves) / MEBIBYTE
        return [f"each of {mesh.size} devices holds all of the state, {total:.1f} MiB: mesh.fsdp=1"]
    notes = [
        f"whole on each of {mesh.size} devices: {name} {list(shape)}, {mebibytes:.1f} MiB"
        for name, shape, mebibytes in left_whole(abstract)
    ]
    uncut = [name for name, leaf in leaves if _axes(leaf) & WEIGHT_AXES == {"fsdp"}]
    if mesh.shape["sequence"] > 1 and uncut:
        both = mesh.shape["fsdp"] * mesh.shape["sequence"]
        notes.append(
            f"not cut over mesh.sequence, since mesh.fsdp x mesh.sequence = {both} does not divide "
            f"model.width: {len(uncut)} arrays, such as {uncut[0]}"
        )
    return notes


def _named(tree) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]


def _axes(leaf) -> set[str]:
    """The mesh axes that an array is cut over."""
    parts = [(part,) if isinstance(part, str) else part or () for part in leaf.sharding.spec]
    return {axis for part in parts for axis in part}


def in_mesh(function, mesh: Mesh):
    """`function` jitted or called where logical axis names mean axes of `mesh`."""

    def call(*args):
        with jax.set_mesh(mesh), nn.logical_axis_rules(LOGICAL_AXIS_RULES):
            return function(*args)

    return call


def logical_axis_shards(name: str) -> int:
    """Over how many devices a logical axis lies on the mesh at hand; 1 where none is set."""
    mesh = jax.sharding.get_abstract_mesh()
    spec = nn.logical_to_mesh_axes((name,))
    if mesh.empty or not spec or spec[0] is None:
        return 1
    names = (spec[0],) if isinstance(spec[0], str) else spec[0]
    return math.prod(mesh.shape[axis] for axis in names)
