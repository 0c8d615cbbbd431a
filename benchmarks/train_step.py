"""The jitted training step of an experiment: time, utilisation, memory, and where the time goes.

    python -m benchmarks.train_step --experiment E [--config.KEY=VALUE ...] [--json FILE]

The batch is generated once and lies on the device: nothing but the step is measured. The peak that
utilisation refers to is the best square matmul in the dtype of the computation, measured by turns
with the steps. See RESULTS.md.
"""

import argparse
import json
import math
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from benchmarks.machine import describe_machine
from benchmarks.profile import costs_by_part
from benchmarks.table import table
from elastictok_jax.cli import split_command_line
from elastictok_jax.config import apply_overrides, resolve_config
from elastictok_jax.experiment_registry import get_experiment
from elastictok_jax.hardware import measured_matmul_flops
from elastictok_jax.models.base import Task
from elastictok_jax.models.registry import family_of_config
from elastictok_jax.parallel.mesh import make_mesh
from elastictok_jax.parallel.sharding import batch_sharding, replicate, with_logical_axes
from elastictok_jax.training.host_consensus import Votes
from elastictok_jax.training.state import abstract_state, init_state_sharded
from elastictok_jax.training.step import jit_train_step


def generated_batch(task: Task, config: ml_collections.ConfigDict, sharding) -> dict[str, Any]:
    """Puts random pixels in one clip a sequence on the devices."""
    rng = np.random.default_rng(0)
    spec = task.batch_spec(config.data.batch_size)
    batch = {
        "patches": rng.integers(0, 256, spec["patches"].shape, dtype=np.uint8),
        "segment_ids": np.ones(spec["segment_ids"].shape, np.int32),
    }
    return jax.device_put(batch, sharding)


def peak_bytes() -> int:
    """Most memory held so far: of a device, or of this process where devices do not say."""
    stats = jax.local_devices()[0].memory_stats()
    if stats:
        return stats["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(config: ml_collections.ConfigDict, *, steps: int) -> dict[str, Any]:
    """Figures of the training step; `steps` are timed, each to its end."""
    task, codec = family_of_config(config)
    mesh = make_mesh(config, check_model=task.check_mesh)
    abstract = abstract_state(task, config, mesh)
    step = jit_train_step(task, config, abstract)
    state = init_state_sharded(task, config, abstract)
    batch = generated_batch(task, config, batch_sharding(mesh))
    frozen = replicate(task.frozen(), mesh)
    inputs = (batch, frozen, Votes(mesh).cast(stop=False, replaced_blocks=0))

    start = time.perf_counter()
    compiled = with_logical_axes(step.lower, mesh)(state, *inputs).compile()
    compile_seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()

    times, peaks = [], [measured_matmul_flops(config.compute.dtype)]
    for index in range(steps + 2):
        start = time.perf_counter()
        state, metrics = compiled(state, *inputs)
        jax.block_until_ready((state, metrics))
        times.append(time.perf_counter() - start)
        if index % max(1, steps // 4) == 0:
            peaks.append(measured_matmul_flops(config.compute.dtype))
    times, peak = times[2:], max(peaks) * jax.device_count()
    seconds = statistics.median(times)

    def one_more() -> None:
        nonlocal state
        state, metrics = compiled(state, *inputs)
        jax.block_until_ready(metrics)

    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract.params))
    tokens = math.prod(batch["segment_ids"].shape)
    matmul_flops = 6.0 * parameters * tokens
    model_flops = task.flops_per_row() * config.data.batch_size
    return {
        "machine": describe_machine(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "experiment": config.name,
        "million_parameters": parameters / 1e6,
        "batch": f"{config.data.batch_size} x {config.data.sequence_blocks} blocks of "
        f"{codec.geometry.tokens} tokens",
        "dtype": config.compute.dtype,
        "compile_seconds": compile_seconds,
        "step_seconds": seconds,
        "quickest_step_seconds": min(times),
        "tokens_per_second": tokens / seconds,
        "matmul_peak_gflops": peak / 1e9,
        "utilisation_6_parameters_tokens": matmul_flops / seconds / peak,
        "utilisation_with_attention": model_flops / seconds / peak,
        "peak_gib": peak_bytes() / 2**30,
        "compiler_temporaries_gib": memory.temp_size_in_bytes / 2**30,
        "parts": costs_by_part(one_more, compiled.as_text()),
    }


def main(argv: list[str] | None = None) -> None:
    words, overrides = split_command_line(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--experiment", required=True, help="a registered name or path/file.py")
    parser.add_argument("--steps", type=int, default=20, help="steps to time")
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args(words)
    config = get_experiment(args.experiment)
    apply_overrides(config, overrides)
    results = measure(resolve_config(config), steps=args.steps)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    parts = results.pop("parts")
    print(table([{"": key, "value": value} for key, value in results.items()]))
    seen = table(parts) if parts else "the profiler saw no operation: see benchmarks/profile.py"
    print(f"\nwhere the time of a step goes\n\n{seen}")


if __name__ == "__main__":
    main()
