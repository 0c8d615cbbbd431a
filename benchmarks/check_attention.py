"""Whether each attention backend is right on this device: against the dense reference in float32.

    python -m benchmarks.check_attention [--backends NAME,NAME,...] [--json FILE]

Forward and gradients, float32 and bfloat16, packed clips with padding, blocks that tiles cut and
blocks that they do not. Exit status 1 if any is wrong. The tests do the same for CPUs, where the
kernels for accelerators are interpreted; here they run as they are compiled.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.table import table
from elastictok_jax.layers.attention.api import SequenceLayout, attention
from elastictok_jax.layers.attention.dense import dense_attention

BACKENDS = {
    "cpu": "blockwise,fused,splash",
    "gpu": "dense,blockwise,fused",
    "tpu": "blockwise,splash",
}
# Tokens, tokens a block, head width.
CASES = ((1024, 256, 128), (1000, 100, 64))
# Of values and gradients up to a few units: float32 sums, and three roundings to bfloat16 (2^-9).
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.03}
HEADS = 2


def packed_clips(tokens: int) -> np.ndarray:
    """int32 [2, tokens]: three clips and padding; one clip."""
    segments = np.ones((2, tokens), np.int32)
    ends = [tokens // 3, tokens // 2, tokens - tokens // 7]
    segments[0] = np.searchsorted(ends, np.arange(tokens), side="right") + 1
    segments[0, ends[2] :] = 0
    return segments


def reference(arrays, places: SequenceLayout) -> tuple[jax.Array, ...]:
    """Output and gradients in float32, whatever the dtype of `arrays`."""
    *qkv, cotangent = (x.astype(jnp.float32) for x in arrays)
    block_S = jnp.arange(places.segments_BS.shape[1]) // places.tokens_per_block

    def dense(query, key, value):
        return dense_attention(
            *(query, key, value),
            query_segments_BS=places.segments_BS,
            key_segments_BT=places.segments_BS,
            rank_mask_BST=block_S[None, :] <= block_S[:, None],
        )

    out, pull = jax.vjp(dense, *qkv)
    return out, *pull(cotangent)


def largest_error(backend: str, dtype: str, *, tokens: int, block: int, width: int) -> float:
    """Of output and gradients, absolute."""
    rng = np.random.default_rng(0)
    shape = (2, tokens, HEADS, width)
    arrays = [jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(4)]
    places = SequenceLayout(jnp.arange(tokens), jnp.asarray(packed_clips(tokens)), block)

    def run(*arrays):
        *qkv, cotangent = arrays
        out, pull = jax.vjp(lambda *qkv: attention(*qkv, places=places, backend=backend), *qkv)
        return out, *pull(cotangent)

    # Without this, GPUs and TPUs multiply float32 in fewer bits.
    with jax.default_matmul_precision("highest"):
        wanted = jax.jit(lambda *arrays: reference(arrays, places))(*arrays)
        results = jax.jit(run)(*arrays)
    return max(
        float(jnp.max(jnp.abs(got.astype(jnp.float32) - want)))
        for got, want in zip(results, wanted, strict=True)
    )


def check(backends: list[str]) -> Iterator[dict[str, Any]]:
    """One row a backend, dtype and case; one that fails to run is wrong, with the reason."""
    for backend in backends:
        for dtype, tolerance in TOLERANCES.items():
            for tokens, block, width in CASES:
                row = dict(backend=backend, dtype=dtype, tokens=tokens, block=block, width=width)
                try:
                    error: float | str = largest_error(
                        backend, dtype, tokens=tokens, block=block, width=width
                    )
                except Exception as failure:  # the other backends are checked all the same
                    lines = str(failure).strip().splitlines() or [""]
                    error = f"{type(failure).__name__}: {lines[0][:160]}".replace("|", "/")
                right = isinstance(error, float) and error <= tolerance  # a NaN is not
                yield dict(row, largest_error=error, tolerance=tolerance, right=right)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--backends", default=BACKENDS[jax.default_backend()], help="with commas")
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args(argv)
    rows = []
    for row in check(args.backends.split(",")):
        rows.append(row)
        if args.json:  # at once: a run that is cut short leaves what it has found
            args.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"on {jax.devices()[0].device_kind}\n\n{table(rows)}")
    if not all(row["right"] for row in rows):
        sys.exit("some backend is wrong or did not run: see `right` above")


if __name__ == "__main__":
    main()
