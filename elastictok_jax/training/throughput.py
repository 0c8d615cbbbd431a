"""Model floating-point operations, and the peak they are measured against."""

import functools
import math
import time

import jax
import jax.numpy as jnp
import ml_collections

from elastictok_jax.config import block_tokens
from elastictok_jax.models.elastictok.model import abstract_params

# Dense bf16 peak of one device in FLOP/s, from the vendors' data sheets. Keys start device_kind;
# of two that do, the first counts.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 2307e12 / 2,  # two devices a chip
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H200": 989e12,
}


def train_flops_per_token(config: ml_collections.ConfigDict) -> float:
    """Model operations a token of one training step, rematerialisation not counted.

    6 for each weight of a matrix (2 forward, 4 backward), and 12 x width a visible key a layer
    for scores and mixing; a token sees (N + 1) / 2 of N blocks on average.
    """
    leaves = jax.tree_util.tree_flatten_with_path(abstract_params(config))[0]
    weights = sum(math.prod(leaf.shape) for path, leaf in leaves if path[-1].key == "kernel")
    layers = config.model.encoder_layers + config.model.decoder_layers
    visible_keys = block_tokens(config) * (config.data.sequence_blocks + 1) / 2
    return 6.0 * weights + 12.0 * layers * config.model.width * visible_keys


@functools.cache
def peak_flops(dtype: str) -> float:
    """FLOP/s of one device: from the table for bfloat16, measured with a matmul otherwise."""
    kind = jax.devices()[0].device_kind
    for name, peak in PEAK_FLOPS.items():
        if kind.startswith(name) and dtype == "bfloat16":
            return peak
    return measured_matmul_flops(dtype)


def measured_matmul_flops(dtype: str, *, size: int | None = None, repeats: int = 5) -> float:
    """Best of `repeats` products of square matrices of random values, in FLOP/s.

    Args:
      size: of a side; by default 1024 on a CPU and 8192 elsewhere, where less would measure the
        start of the program.
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
