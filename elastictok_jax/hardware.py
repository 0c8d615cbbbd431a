"""Peak FLOP/s of accelerators, and the memory and bandwidth of TPU chips.

Sources, one page per chip: https://cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e and /tpu7x. They
state "bidirectional" interconnect bandwidth; half of it is outgoing. The v4 page states none: six
links of 50 GB/s each way are from arXiv 2304.01433, table 4.
"""

import dataclasses
import functools
import math
import time

import jax
import jax.numpy as jnp

GIB = 2**30

# Dense bf16 peak of one device in FLOP/s, from the vendors' data sheets. Keys are prefixes of
# device_kind; the first one that matches counts.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 2307e12 / 2,  # two devices per chip
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H200": 989e12,
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU chip.

    Attributes:
      peak_flops: bf16 FLOP/s of the chip, all its devices together.
      hbm_bytes: capacity of the chip's memory.
      usable_bytes: memory that a program may use on one device, from errors of libtpu 0.0.42's
        compiler ("exceeds available HBM").
      hbm_bandwidth: bytes per second between the chip and its memory.
      ici_bandwidth: bytes per second that leave the chip, all its links together.
      ici_links: links to neighbours, two on each axis of the torus.
      dcn_bandwidth: bytes per second per chip to other slices; None if no page states it.
      devices: JAX devices per chip.
      config: libtpu's name for the chip's configuration, if it is not the default one.
    """

    name: str
    peak_flops: float
    hbm_bytes: float
    usable_bytes: float
    hbm_bandwidth: float
    ici_bandwidth: float
    ici_links: int
    dcn_bandwidth: float | None
    devices: int = 1
    config: str | None = None


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v4",
            peak_flops=PEAK_FLOPS["TPU v4"],
            hbm_bytes=32 * GIB,
            usable_bytes=30.75 * GIB,
            hbm_bandwidth=1200e9,
            ici_bandwidth=300e9,
            ici_links=6,
            dcn_bandwidth=None,
            config="megacore",  # both cores are one device, as on a v4 machine
        ),
        Chip(
            name="v5e",
            peak_flops=PEAK_FLOPS["TPU v5 lite"],
            hbm_bytes=16 * GIB,
            usable_bytes=15.75 * GIB,
            hbm_bandwidth=819e9,
            ici_bandwidth=200e9,
            ici_links=4,
            dcn_bandwidth=6.4e12 / 8 / 256,  # the page gives 6.4 Tbps per pod of 256 chips
        ),
        Chip(
            name="v5p",
            peak_flops=PEAK_FLOPS["TPU v5"],
            hbm_bytes=95.74 * GIB,  # "95 GB" on the page, less than the compiler will use
            usable_bytes=95.74 * GIB,
            hbm_bandwidth=2765e9,
            ici_bandwidth=600e9,
            ici_links=6,
            dcn_bandwidth=50e9 / 8,
        ),
        Chip(
            name="v6e",
            peak_flops=PEAK_FLOPS["TPU v6 lite"],
            hbm_bytes=32 * GIB,
            usable_bytes=31.25 * GIB,
            hbm_bandwidth=1638e9,
            ici_bandwidth=400e9,
            ici_links=4,
            dcn_bandwidth=100e9 / 8,
        ),
        Chip(
            name="tpu7x",
            peak_flops=2 * PEAK_FLOPS["TPU7x"],
            hbm_bytes=192 * GIB,
            usable_bytes=94.75 * GIB,
            hbm_bandwidth=7380e9,
            ici_bandwidth=600e9,
            ici_links=6,
            dcn_bandwidth=100e9 / 8,
            devices=2,
        ),
    )
}


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
