"""Attention backends on one device: time, rate, share of the matmul peak, temporary memory.

    python -m benchmarks.attention [--tokens N,N,...] [--backends NAME,NAME,...] [--json FILE]

One clip of blocks of --block tokens. Operations are those of visible scores alone, 4 x head width a
score forward and 8 backward (what is computed again is not counted), so a backend that computes
hidden scores shows a lower rate. The peak is the best square matmul in the same dtype, measured by
turns with the backends. What cannot run, or would not fit, is listed with the reason.

A name may carry tile sizes, to choose them by measurement: `blockwise:512x1024` is queries x keys
of a tile, `fused:128x64x8` tokens that a program holds x tokens that pass x warps. `cudnn` is no
backend of elastictok_jax but what to compare with: cuDNN's kernel through jax, a call a block of
queries, which is right for one clip without padding and only there. See RESULTS.md.
"""

import argparse
import functools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.machine import describe_machine
from benchmarks.table import table
from elastictok_jax.errors import UsageError
from elastictok_jax.hardware import measured_matmul_flops
from elastictok_jax.layers.attention.api import SequenceLayout, attention
from elastictok_jax.layers.attention.blockwise import BlockwiseKernel
from elastictok_jax.layers.attention.kernel import Kernel, Visibility, flash_attention

TOKENS = "4096,8192,16384,32768,65536"
BACKENDS = {
    "cpu": "dense,blockwise",
    "gpu": "dense,blockwise,fused,cudnn",
    "tpu": "dense,blockwise,splash",
}
# Which platform runs a backend as a program: elsewhere it is interpreted, or missing.
HOME = {"fused": "gpu", "splash": "tpu", "cudnn": "gpu"}
# Operations a visible score, in units of the head width.
FORWARD, FORWARD_BACKWARD = 4, 12
# Fewest seconds of a timed stretch of calls, so that starting them costs little beside it.
STRETCH = 0.1


def visible_scores(tokens: int, block: int) -> int:
    """Pairs of a query and a key that it sees, in one clip."""
    starts = range(0, tokens, block)
    return sum(min(block, tokens - start) * min(start + block, tokens) for start in starts)


def attend(name: str, query, key, value, *, places: SequenceLayout) -> jax.Array:
    """Attention by the backend of this name, [B, S, H, K].

    Raises:
      UsageError: if there is no such backend, or it does not run on this platform.
    """
    backend, _, tiles = name.partition(":")
    platform = jax.default_backend()
    if HOME.get(backend, platform) != platform:
        raise UsageError(f"runs on a {HOME[backend]} alone, and this is a {platform}")
    if backend == "cudnn":
        return _cudnn(query, key, value, places.tokens_per_block)
    if not tiles:
        return attention(query, key, value, places=places, backend=backend)
    visibility = Visibility(places.segments_BS, places.segments_BS, places.tokens_per_block)
    inputs = (x.swapaxes(1, 2) for x in (query, key, value))
    return flash_attention(_with_tiles(backend, tiles), *inputs, visibility).swapaxes(1, 2)


def _with_tiles(backend: str, tiles: str) -> Kernel:
    sizes = [int(size) for size in tiles.split("x")]
    if backend == "blockwise" and len(sizes) == 2:
        return BlockwiseKernel(*sizes)
    if backend == "fused" and len(sizes) == 3:
        from elastictok_jax.layers.attention.fused import FusedKernel, Tiles

        return FusedKernel(
            interpret=False, forward_tiles=Tiles(*sizes), backward_tiles=Tiles(*sizes)
        )
    raise UsageError(f"{backend}:{tiles}: give blockwise:QUERIESxKEYS or fused:HELDxPASSINGxWARPS")


def _cudnn(query, key, value, block: int) -> jax.Array:
    """Every block of queries with the keys up to its end: no mask is needed."""
    parts = []
    for start in range(0, query.shape[1], block):
        end = min(start + block, query.shape[1])
        qkv = (query[:, start:end], key[:, :end], value[:, :end])
        parts.append(jax.nn.dot_product_attention(*qkv, implementation="cudnn"))
    return jnp.concatenate(parts, axis=1)


def memory_limit() -> int:
    """Bytes that programs may hold: of the device, or of this machine where it has none."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def seconds_a_call(run: Callable[[], Any], *, at_least: float) -> float:
    """Median over stretches of calls; a call is run to its end before any is timed."""

    def timed(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            result = run()
        jax.block_until_ready(result)
        return time.perf_counter() - start

    timed(1)
    first = timed(1)
    calls, times, spent = max(1, round(STRETCH / first)), [first], first
    while spent < at_least or (calls > 1 and len(times) < 2):
        stretch = timed(calls)
        times.append(stretch / calls)
        spent += stretch
    return statistics.median(times[1:] or times)


def programs(name: str, places: SequenceLayout) -> dict[str, Callable]:
    """The functions that are timed, of (query, key, value, cotangent)."""

    def forward(*arrays):
        return attend(name, *arrays[:3], places=places)

    def forward_backward(*arrays):
        out, pull = jax.vjp(lambda *qkv: attend(name, *qkv, places=places), *arrays[:3])
        return out, *pull(arrays[3])

    return {"forward": forward, "forward+backward": forward_backward}


def measure_one(run: Callable, arrays, *, at_least: float) -> tuple[float, int]:
    """(seconds a call, bytes of the compiler's temporaries).

    Raises:
      UsageError: if it would not fit.
    """
    compiled = jax.jit(run).lower(*arrays).compile()
    memory: Any = compiled.memory_analysis()
    needed = memory.temp_size_in_bytes + memory.output_size_in_bytes
    held = sum(x.nbytes for x in arrays)
    if needed + held > memory_limit():
        raise UsageError(
            f"needs {(needed + held) / 2**30:.3g} GiB of {memory_limit() / 2**30:.3g} GiB"
        )
    seconds = seconds_a_call(functools.partial(compiled, *arrays), at_least=at_least)
    return seconds, memory.temp_size_in_bytes


def measure(
    names: list[str],
    *,
    tokens: list[int],
    heads: int,
    width: int,
    block: int,
    dtype: str,
    at_least: float,
) -> Iterator[dict[str, Any]]:
    """Figures of every backend, size and pass so far, after each backend of each size.

    `at_least` seconds are timed for each.
    """
    peaks = [measured_matmul_flops(dtype)]
    rows: list[dict[str, Any]] = []
    for size in tokens:
        rng = np.random.default_rng(0)
        arrays = [
            jnp.asarray(rng.standard_normal((1, size, heads, width), np.float32), dtype)
            for _ in range(4)
        ]
        places = SequenceLayout(jnp.arange(size), jnp.ones((1, size), jnp.int32), block)
        scores = heads * visible_scores(size, block)
        for name in names:
            for passes, run in programs(name, places).items():
                row: dict[str, Any] = dict(tokens=size, backend=name, passes=passes)
                try:
                    seconds, temporary = measure_one(run, arrays, at_least=at_least)
                except Exception as error:  # whatever it is, the others are measured
                    row |= dict(ms="", tflops="", temporaries_mib="", note=_reason(error))
                else:
                    each = FORWARD if passes == "forward" else FORWARD_BACKWARD
                    tflops = each * width * scores / seconds / 1e12
                    row |= dict(ms=seconds * 1e3, tflops=tflops)
                    row |= dict(temporaries_mib=temporary / 2**20, note="")
                rows.append(row)
            peaks.append(measured_matmul_flops(dtype))
            peak = max(peaks) / 1e12
            yield {
                "machine": describe_machine(),
                "device": jax.devices()[0].device_kind,
                "jax": jax.__version__,
                "shape": f"1 sequence, {heads} heads of width {width}, blocks of {block} tokens, "
                f"{dtype}",
                "matmul_peak_tflops": peak,
                "rows": [_with_share(row, peak) for row in rows],
            }


def _with_share(row: dict[str, Any], peak: float) -> dict[str, Any]:
    share = row["tflops"] / peak if row["tflops"] else ""
    return {key: row[key] for key in row if key != "note"} | dict(
        share_of_peak=share, note=row["note"]
    )


def _reason(error: Exception) -> str:
    """The first line of an error, as a cell of a table."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}".replace("|", "/")


def main(argv: list[str] | None = None) -> None:
    platform = jax.default_backend()
    heads, dtype = (1, "float32") if platform == "cpu" else (8, "bfloat16")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--tokens", default=TOKENS, help="tokens of a sequence, with commas")
    parser.add_argument("--backends", default=BACKENDS[platform], help="names, with commas")
    parser.add_argument("--heads", type=int, default=heads)
    parser.add_argument("--width", type=int, default=128, help="of a head")
    parser.add_argument("--block", type=int, default=4096, help="tokens of a block")
    parser.add_argument("--dtype", default=dtype)
    parser.add_argument("--seconds", type=float, default=1.0, help="time each for so long")
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args(argv)
    for results in measure(
        args.backends.split(","),
        tokens=[int(size) for size in args.tokens.split(",")],
        heads=args.heads,
        width=args.width,
        block=args.block,
        dtype=args.dtype,
        at_least=args.seconds,
    ):
        if args.json:  # at once: a run that is cut short leaves what it has measured
            args.json.write_text(json.dumps(results, indent=1) + "\n")
    rows = results.pop("rows")
    print(table([{"": key, "value": value} for key, value in results.items()]))
    print(f"\n{table(rows)}")


if __name__ == "__main__":
    main()
