"""One table from the logical axes that models name to the axes of the mesh."""

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


def replicate(tree, mesh: Mesh):
    """Arrays that every process has, as one whole copy on every device."""
    whole = replicated(mesh)
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, whole, lambda index: x[index]), tree
    )


def in_mesh(function, mesh: Mesh):
    """`function` jitted or called where logical axis names mean axes of `mesh`."""

    def call(*args):
        with jax.set_mesh(mesh), nn.logical_axis_rules(LOGICAL_AXIS_RULES):
            return function(*args)

    return call
