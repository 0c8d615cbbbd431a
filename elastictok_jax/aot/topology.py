"""Descriptions of TPU pods that are not attached, for the TPU compiler, which runs on any CPU."""

import dataclasses
import importlib.util
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from elastictok_jax.errors import UsageError, first_line
from elastictok_jax.hardware import CHIPS, Chip

# libtpu queries the machine that it runs on, which is no TPU host. No device is opened, so several
# processes may compile at once.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v4-512",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
HOST = (2, 2, 1)  # chips of one host


@dataclasses.dataclass(frozen=True)
class Topology:
    """A described pod.

    Attributes:
      name: such as "v4:8x8x4", with the chips along each axis of the torus.
      chip: the type of its chips.
      slices: the number of pods of that shape, joined by the data-center network.
      devices: what `jax.devices()` would return on it.
    """

    name: str
    chip: Chip
    slices: int
    devices: tuple[Any, ...]


def describe_topology(name: str, *, slices: int = 1) -> Topology:
    """Describes the pod called `name`. JAX itself stays on the CPU.

    Raises:
      UsageError: if the TPU compiler is not installed, or there is no such pod.
    """
    matched = re.fullmatch(r"(\w+):(\d+(?:x\d+){1,2})", name)
    if not matched:
        raise UsageError(f"--topology {name}: write CHIP:SHAPE in chips, e.g. v4:8x8x4 or v5e:4x4")
    if matched[1] not in CHIPS:
        raise UsageError(f"--topology {name}: choose a chip of {', '.join(CHIPS)}")
    if slices < 1:
        raise UsageError(f"--slices {slices}: must be 1 or more")
    if importlib.util.find_spec("libtpu") is None:
        raise UsageError(
            "the TPU compiler is not installed: pip install 'jax[tpu]' "
            "(in a checkout: pip install -e '.[tpu]'); it needs no TPU"
        )
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    jax.config.update("jax_platforms", "cpu")
    chip = CHIPS[matched[1]]
    sides = [int(side) for side in matched[2].split("x")] + [1]
    options: dict[str, Any] = {
        "chips_per_host_bounds": tuple(map(min, zip(HOST, sides, strict=False)))
    }
    if chip.config:
        options["chip_config_name"] = chip.config
    if slices > 1:
        options["num_slices"] = slices
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except jax.errors.JaxRuntimeError as error:
        reason = first_line(error)
        raise UsageError(f"--topology {name}: unknown to the TPU compiler ({reason})") from None
    return Topology(name, chip, slices, tuple(described.devices))
