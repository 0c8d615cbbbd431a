"""Compiles the training step of an experiment for H200s on a machine that has none: its memory.

    python -m benchmarks.compile_gpu --experiment E [--devices N] [--config.KEY=VALUE ...]

The compiler for GPUs is in `pip install 'jax[cuda13]'`, which needs no GPU. Matrix products are not
tuned, which only a GPU can do. What is printed is the compiler's plan, in GiB a device; that it
compiles, and fits, is known then, and nothing of its speed.
"""

import argparse
import sys
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from benchmarks.table import table
from elastictok_jax.aot.programs import programs
from elastictok_jax.cli import split_command_line
from elastictok_jax.config import apply_overrides, resolve_config
from elastictok_jax.errors import UsageError
from elastictok_jax.experiment_registry import get_experiment
from elastictok_jax.models.registry import family_of_config
from elastictok_jax.parallel.mesh import AXES, DCN, check_mesh_fits, mesh_sizes

# What the compiler asks of a chip, in XLA's own text format.
H200 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  fpus_per_core: 128
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 52428800
  memory_bandwidth: 4800000000000
  device_memory_size: 150000000000
  clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H200"
"""


def h200_devices(count: int) -> list[jax.Device]:
    """Descriptions of `count` H200s of one machine, to compile for.

    Raises:
      UsageError: if jax has no compiler for GPUs here.
    """
    options = dict(topology=f"1x1x{count}", target_config=H200)
    try:
        return topologies.get_topology_desc("h200", platform="cuda", **options).devices
    except (KeyError, NotImplementedError, RuntimeError) as error:
        raise UsageError(
            f"jax has no compiler for GPUs here ({error}): pip install 'jax[cuda13]'"
        ) from error


def plan(config, *, devices: list[jax.Device]) -> dict[str, Any]:
    """Memory of the compiled training step; `config` is as given, not resolved.

    Raises:
      UsageError: if the config is bad, or its mesh does not fit the devices, which are one machine.
    """
    config = resolve_config(config)
    if any(config.mesh[DCN + axis] not in (1, -1) for axis in AXES):
        raise UsageError("these H200s are one machine: leave mesh.dcn_* at 1")
    sizes = mesh_sizes(config, devices=len(devices))
    check_mesh_fits(config, sizes, family_of_config(config).task.check_mesh)
    mesh = Mesh(
        np.array(devices).reshape([sizes[axis] for axis in AXES]),
        AXES,
        axis_types=(AxisType.Auto,) * len(AXES),
    )
    train_step = programs(config, mesh)[0]
    options: Any = {"xla_gpu_autotune_level": 0}
    start = time.perf_counter()
    compiled = train_step.lower().compile(compiler_options=options)
    memory: Any = compiled.memory_analysis()
    return {
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "attention": config.compute.attention,
        "remat": config.compute.remat,
        "batch": f"{config.data.batch_size} x {config.data.sequence_blocks} blocks",
        "state_and_batch_gib": memory.argument_size_in_bytes / 2**30,
        "temporaries_gib": memory.temp_size_in_bytes / 2**30,
        "compile_seconds": time.perf_counter() - start,
    }


def main(argv: list[str] | None = None) -> None:
    words, overrides = split_command_line(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--experiment", required=True, help="a registered name or path/file.py")
    parser.add_argument("--devices", type=int, default=1)
    args = parser.parse_args(words)
    jax.config.update("jax_platforms", "cpu")
    config = get_experiment(args.experiment)
    apply_overrides(config, overrides)
    print(table([plan(config, devices=h200_devices(args.devices))]))


if __name__ == "__main__":
    main()
