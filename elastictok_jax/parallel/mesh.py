"""Makes the device mesh, with axes data, fsdp, tensor and sequence, within and between slices.

`mesh.X` is the size of axis X within a slice, over its fast links (ICI, NVLink), and `mesh.dcn_X`
the number of slices along X, over the data-center network; the axis has the product of both. TPU
devices state their slice; elsewhere each process counts as a slice. If every dcn size is 1,
`mesh.X` is the full axis, over all processes.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import ml_collections
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from elastictok_jax.errors import UsageError

AXES = (
    "data",
    "fsdp",
    "tensor",
    "sequence",
)  # the last ones communicate most, and get the nearest links
DCN = "dcn_"
CheckModel = Callable[[Mapping[str, int], Mapping[str, str]], None]


def mesh_sizes(config: ml_collections.ConfigDict, *, devices: int) -> dict[str, int]:
    """Returns axis sizes within a slice of `devices` devices from `config.mesh`, with -1 resolved.

    Raises:
      UsageError: if their product is not the number of devices.
    """
    return _filled(config, "", count=devices, things="devices")


def _filled(
    config: ml_collections.ConfigDict, prefix: str, *, count: int, things: str
) -> dict[str, int]:
    sizes = {axis: config.mesh[prefix + axis] for axis in AXES}
    text = ", ".join(f"mesh.{prefix}{axis}={size}" for axis, size in sizes.items())
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UsageError(f"{text}: sizes must be positive, and at most one may be -1")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free:
        if count % fixed:
            raise UsageError(f"{text}: {fixed} does not divide the {count} {things} available")
        sizes[free[0]] = count // fixed
    elif fixed != count:
        raise UsageError(
            f"{text}: {fixed} {things} are requested and {count} are available; set one to -1 "
            "to take what is left"
        )
    return sizes


def make_mesh(
    config: ml_collections.ConfigDict,
    devices: Sequence[jax.Device] | None = None,
    *,
    check_model: CheckModel,
) -> Mesh:
    """Returns the mesh of a resolved config, checked against batch, sequence and model.

    Args:
      check_model: `Task.check_mesh` of the model that runs on it.
      devices: default to all devices of the run; may be those of a described TPU topology.

    Raises:
      UsageError: if the mesh does not fit the devices, the batch, the sequence or the model.
    """
    devices = jax.devices() if devices is None else devices
    by_process = devices[0].platform != "tpu"
    slices = {_slice_of(device) for device in devices}
    between = dict.fromkeys(AXES, 1)
    if any(config.mesh[DCN + axis] != 1 for axis in AXES):
        kind = "processes" if by_process else "slices"
        between = _filled(config, DCN, count=len(slices), things=kind)
    elif len(slices) > 1 and not by_process:
        raise UsageError(
            f"the devices are {len(slices)} slices: set the axis along them, "
            "most often mesh.dcn_data=-1"
        )
    within = mesh_sizes(config, devices=len(devices) // math.prod(between.values()))
    check_mesh_fits(config, {axis: within[axis] * between[axis] for axis in AXES}, check_model)

    def layout(*, allow_split_physical_axes: bool) -> np.ndarray:
        if math.prod(between.values()) == 1:
            return mesh_utils.create_device_mesh(
                tuple(within.values()),
                devices,
                allow_split_physical_axes=allow_split_physical_axes,
            )
        return mesh_utils.create_hybrid_device_mesh(
            tuple(within.values()),
            tuple(between.values()),
            devices,
            process_is_granule=by_process,
            allow_split_physical_axes=allow_split_physical_axes,
        )

    try:
        laid_out = layout(allow_split_physical_axes=False)
    except NotImplementedError:  # sizes that need an axis of the torus to be split
        laid_out = layout(allow_split_physical_axes=True)
    return Mesh(laid_out, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _slice_of(device: jax.Device) -> int:
    """Returns the slice of a TPU device (0 if a topology has only one), else its process."""
    if device.platform != "tpu":
        return device.process_index
    return device.slice_index if hasattr(device, "slice_index") else 0


def check_mesh_fits(
    config: ml_collections.ConfigDict, sizes: Mapping[str, int], check_model: CheckModel
) -> None:
    """Checks that mesh axes of these `sizes` divide batch, sequence and model.

    Raises:
      UsageError: naming the setting, the axis, and the nearest settings that fit.
    """
    names = {axis: _axis(config, axis) for axis in AXES}
    pieces = config.optimizer.accumulate_steps
    batch, shards = config.data.batch_size // pieces, sizes["data"] * sizes["fsdp"]
    if batch % shards:
        near = shards * max(1, round(batch / shards)) * pieces
        raise UsageError(
            f"data.batch_size = {config.data.batch_size} (in {pieces} microbatches of {batch}) is "
            f"not divided by the mesh: {names['data']} x {names['fsdp']} = {shards}"
            f"; the nearest data.batch_size that fits is {near}"
        )
    check_model(sizes, names)


class Divided(NamedTuple):
    """A setting that a mesh axis must divide.

    Attributes:
      key, value: of the config.
      unit: positions along the axis per unit of the value.
      axis: of the mesh.
      fits: returns whether another value would fit the mesh and the rest of the model.
    """

    key: str
    value: int
    unit: int
    axis: str
    fits: Callable[[int], bool]


def require_mesh_axis_divides(
    setting: Divided, *, sizes: Mapping[str, int], axis_names: Mapping[str, str]
) -> None:
    """Raises UsageError, with the nearest values that fit, unless the axis divides the setting."""
    key, value, unit, axis, fits = setting
    if value * unit % sizes[axis]:
        tokens = f" x {unit} tokens" if unit > 1 else ""
        raise UsageError(
            f"{key} = {value}{tokens} is not a multiple of {axis_names[axis]} = {sizes[axis]}; "
            f"{_nearest(value, fits)}"
        )


def _axis(config: ml_collections.ConfigDict, axis: str) -> str:
    """Returns the names of the settings whose product is the size of an axis."""
    between = config.mesh[DCN + axis] != 1
    return f"mesh.{axis} x mesh.{DCN}{axis}" if between else f"mesh.{axis}"


def _nearest(size: int, fits: Callable[[int], bool]) -> str:
    """Returns a phrase with the nearest values below and above `size` that fit."""
    below = next((n for n in range(size - 1, 0, -1) if fits(n)), None)
    farthest = 64 * size  # a value beyond it is not near, or none fits
    above = next((n for n in itertools.count(size + 1) if n > farthest or fits(n)), None)
    near = [str(n) for n in (below, above) if n is not None and n <= farthest]
    if not near:
        return "none fits: make that axis smaller"
    return f"the nearest that {'fit are' if len(near) > 1 else 'fits is'} {' and '.join(near)}"
