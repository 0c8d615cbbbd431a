"""Finds the peak FLOP/s of a device, against which model FLOP utilisation is computed."""

import functools
import math
import time

import jax
import jax.numpy as jnp

from elastictok_jax.hardware import PEAK_FLOPS


@functools.cache
def peak_flops(dtype: str) -> float:
    """Returns FLOP/s of one device: from the table for bfloat16, else measured with a matmul."""
    kind = jax.devices()[0].device_kind
    for name, peak in PEAK_FLOPS.items():
        if kind.startswith(name) and dtype == "bfloat16":
            return peak
    return measured_matmul_flops(dtype)


def measured_matmul_flops(dtype: str, *, size: int | None = None, repeats: int = 5) -> float:
    """Returns the FLOP/s of the fastest of `repeats` products of random square matrices.

    Args:
      size: of a side; by default 1024 on a CPU and 8192 elsewhere, where smaller products would
        measure launch overhead.
    """
    if size is None:
        size = 1024 if jax.default_backend() == "cpu" else 8192
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    matmul = jax.jit(jnp.matmul)
    matmul(x, x).block_until_ready()
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        matmul(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best
