"""Maps the logical axes that models name to mesh axes, in one table."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Weights are sharded over `sequence` too: it has most devices in long-context training, and would
# otherwise multiply the memory of weights and moments (paper, section 3.3: fully sharded, ring
# attention).
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
    """Returns PartitionSpecs of a tree of parameters boxed with logical axis names.

    If the mesh axes of a rule do not divide an axis together, it is sharded over the longest prefix
    of them that does: a width of 24 on fsdp 4 x sequence 4 is sharded over fsdp alone.

    Args:
      sizes: size of each mesh axis.
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
    """Returns NamedShardings of a tree of parameters boxed with logical axis names."""
    specs = param_specs(boxed_params, mesh.shape)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of [B, S, ...] batches: B over data and fsdp, S over sequence."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "sequence"))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays that are replicated on every device."""
    return NamedSharding(mesh, PartitionSpec())


def replicate(tree, mesh: Mesh):
    """Replicates a tree of host arrays, the same in every process, on every device."""
    sharding = replicated(mesh)
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), tree
    )


class ReplicatedArray(NamedTuple):
    """A replicated array."""

    name: str
    shape: tuple[int, ...]
    mebibytes: float


def replicated_arrays(abstract, *, above_mebibytes: float = 1.0) -> list[ReplicatedArray]:
    """Returns the replicated arrays of a tree of ShapeDtypeStructs with shardings, largest first.

    Leaves out arrays up to `above_mebibytes`, and all arrays on a mesh of one device.
    """
    found = [
        ReplicatedArray(name, leaf.shape, leaf.size * leaf.dtype.itemsize / MEBIBYTE)
        for name, leaf in _named(abstract)
        if leaf.sharding.num_devices > 1 and leaf.sharding.is_fully_replicated
    ]
    large = [array for array in found if array.mebibytes > above_mebibytes]
    return sorted(large, key=lambda array: (-array.mebibytes, array.name))


def sharding_notes(abstract) -> list[str]:
    """Returns lines for the log of a run on arrays that take more memory than they have to."""
    leaves = _named(abstract)
    mesh = leaves[0][1].sharding.mesh
    if mesh.size == 1:
        return []
    if all(leaf.sharding.is_fully_replicated for _, leaf in leaves):
        total = sum(leaf.size * leaf.dtype.itemsize for _, leaf in leaves) / MEBIBYTE
        return [f"each of {mesh.size} devices holds all of the state, {total:.1f} MiB: mesh.fsdp=1"]
    notes = [
        f"replicated on each of {mesh.size} devices: {name} {list(shape)}, {mebibytes:.1f} MiB"
        for name, shape, mebibytes in replicated_arrays(abstract)
    ]
    uncut = [name for name, leaf in leaves if _axes(leaf) & WEIGHT_AXES == {"fsdp"}]
    if mesh.shape["sequence"] > 1 and uncut:
        both = mesh.shape["fsdp"] * mesh.shape["sequence"]
        notes.append(
            f"not sharded over mesh.sequence, since mesh.fsdp x mesh.sequence = {both} does not "
            f"divide model.width: {len(uncut)} arrays, such as {uncut[0]}"
        )
    return notes


def _named(tree) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]


def _axes(leaf) -> set[str]:
    """Returns the mesh axes that an array is sharded over."""
    parts = [(part,) if isinstance(part, str) else part or () for part in leaf.sharding.spec]
    return {axis for part in parts for axis in part}


def with_logical_axes(function, mesh: Mesh):
    """Wraps `function` so that logical axis names mean axes of `mesh` while it is traced or run."""

    def call(*args):
        with jax.set_mesh(mesh), nn.logical_axis_rules(LOGICAL_AXIS_RULES):
            return function(*args)

    return call


def logical_axis_shards(name: str) -> int:
    """Returns the number of shards of a logical axis on the current mesh; 1 if no mesh is set."""
    mesh = jax.sharding.get_abstract_mesh()
    spec = nn.logical_to_mesh_axes((name,))
    if mesh.empty or not spec or spec[0] is None:
        return 1
    names = (spec[0],) if isinstance(spec[0], str) else spec[0]
    return math.prod(mesh.shape[axis] for axis in names)
