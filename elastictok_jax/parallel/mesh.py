"""The device mesh: axes data, fsdp, tensor, sequence."""

import math
from collections.abc import Sequence

import jax
import ml_collections
from jax.sharding import AxisType, Mesh

from elastictok_jax.errors import UsageError

AXES = ("data", "fsdp", "tensor", "sequence")


def mesh_sizes(config: ml_collections.ConfigDict, *, devices: int) -> dict[str, int]:
    """Sizes of the axes in `config.mesh`, with one -1 filled in.

    Raises:
      UsageError: if they do not make up the devices.
    """
    sizes = {axis: config.mesh[axis] for axis in AXES}
    text = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UsageError(f"{text}: sizes must be positive, and at most one may be -1")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free:
        if devices % fixed:
            raise UsageError(f"{text}: {fixed} does not divide the {devices} devices at hand")
        sizes[free[0]] = devices // fixed
    elif fixed != devices:
        raise UsageError(
            f"{text}: {fixed} devices are asked for and {devices} are at hand; set one to -1 "
            "to take what is left"
        )
    return sizes


def make_mesh(
    config: ml_collections.ConfigDict, *, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """The mesh of a resolved config over `devices`, by default all that are here, checked against
    batch and model.

    Raises:
      UsageError: if the mesh does not fit the devices, the batch, the sequence or the model.
    """
    count = jax.device_count() if devices is None else len(devices)
    sizes = mesh_sizes(config, devices=count)
    shards = sizes["data"] * sizes["fsdp"]
    batch = config.data.batch_size // config.optimizer.accumulate_steps
    if batch % shards:
        near = shards * max(1, round(batch / shards)) * config.optimizer.accumulate_steps
        raise UsageError(
            f"data.batch_size = {config.data.batch_size} (in {config.optimizer.accumulate_steps} "
            f"microbatches of {batch}) is not divided by the mesh: mesh.data x mesh.fsdp = {shards}"
            f"; the nearest data.batch_size that fits is {near}"
        )
    model = config.model
    for key, size, axis in (
        ("model.width", model.width, "fsdp"),
        ("model.heads", model.heads, "tensor"),
        ("model.mlp_width", model.mlp_width, "tensor"),
        ("data.sequence_blocks", config.data.sequence_blocks, "sequence"),
    ):
        if size % sizes[axis]:
            raise UsageError(f"{key} = {size} is not a multiple of mesh.{axis} = {sizes[axis]}")
    auto = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=auto, devices=devices)
