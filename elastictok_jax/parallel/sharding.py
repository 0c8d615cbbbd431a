"""One table from the logical axes that models name to the axes of the mesh."""

import math

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

LOGICAL_AXIS_RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    ("batch", ("data", "fsdp")),
    ("sequence", "sequence"),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("layers", None),
    ("head_width", None),
    ("patch", None),
    ("latent", None),
    ("norm", None),
)


def param_shardings(boxed_params, mesh: Mesh):
    """NamedShardings of a tree of parameters boxed with logical axis names."""
    specs = nn.get_partition_spec(boxed_params)
    return nn.logical_to_mesh_sharding(specs, mesh, LOGICAL_AXIS_RULES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of [B, S, ...] batches: rows over data and fsdp, tokens over sequence."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "sequence"))


def replicated(mesh: Mesh) -> NamedSharding:
    """One whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


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
