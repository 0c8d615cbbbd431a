"""Fused attention through the public function, its ranges of tiles, what it refuses; for CUDA.

The kernels run in the interpreter here. That they lower for CUDA is checked; how they run there is
checked by benchmarks/gpu.sh on a machine with a GPU.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, AxisType, use_abstract_mesh

from elastictok_jax.errors import UsageError
from elastictok_jax.layers.attention import fused
from elastictok_jax.layers.attention.api import SequenceLayout, attention, make_kernel
from elastictok_jax.layers.attention.blockwise import BlockwiseKernel
from elastictok_jax.layers.attention.kernel import Visibility, flash_attention


def places_of(segments, length):
    segments = jnp.asarray(segments, jnp.int32)
    return SequenceLayout(jnp.arange(segments.shape[1]), segments, length)


def value_and_grads(arrays, places, backend):
    *qkv, cotangent = arrays
    out, pull = jax.vjp(lambda *qkv: attention(*qkv, places=places, backend=backend), *qkv)
    return out, *pull(cotangent)


@pytest.mark.parametrize("width", [8, 48, 128])
def test_packed_clips_and_padding_equal_the_dense_reference(width):
    """Widths below, between and at what the kernels take as they are."""
    rng = np.random.default_rng(width)
    arrays = [jnp.asarray(rng.normal(size=(2, 200, 2, width)), jnp.float32) for _ in range(4)]
    segments = np.zeros((2, 200), int)
    segments[0, :90], segments[0, 90:150] = 1, 2  # then padding; the other row is padding alone
    places = places_of(segments, 60)
    run = jax.jit(value_and_grads, static_argnames="backend")
    wanted = run(arrays, places, "dense")
    for got, want in zip(run(arrays, places, "fused"), wanted, strict=True):
        assert np.abs(want).max() > 0.1
        np.testing.assert_allclose(got, want, atol=1e-5, rtol=0)


def test_scores_far_beyond_float32_exp_stay_finite():
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=(1, 96, 1, 16)), jnp.float32) for _ in range(4)]
    arrays[0] *= 1e3
    places = places_of(np.repeat([[1, 2]], 48, axis=1), 32)
    run = jax.jit(value_and_grads, static_argnames="backend")
    wanted = run(arrays, places, "dense")
    for got, want in zip(run(arrays, places, "fused"), wanted, strict=True):
        # Scores of thousands have steps of 1e-4 in float32, which weights and gradients inherit.
        np.testing.assert_allclose(got, want, atol=1e-3 * float(jnp.abs(want).max()), rtol=0)


@given(
    ids=st.lists(st.integers(0, 3), min_size=1, max_size=200),
    length=st.none() | st.integers(1, 200),
    first=st.none() | st.integers(0, 100),
    query_tile=st.sampled_from([16, 32, 64]),
    key_tile=st.sampled_from([16, 32, 64]),
)
@settings(max_examples=100)
def test_what_is_visible_lies_in_the_tiles_that_pass(ids, length, first, query_tile, key_tile):
    ids_BS = jnp.asarray([ids], jnp.int32)
    seen = Visibility(
        ids_BS, ids_BS, length, None if first is None or length is None else jnp.asarray([first])
    )
    queries, keys = fused._places(seen, max(query_tile, key_tile))
    tiles_BGP = fused._may_see(queries, keys, query_tile, key_tile)
    block_S = ((first or 0) + np.arange(len(ids))) // (length or len(ids) + 200)
    ids_S = np.asarray(ids)
    visible_ST = (ids_S[:, None] == ids_S) & (block_S[None, :] <= block_S[:, None])
    pairs = np.argwhere(visible_ST)
    for tiles, (held, passing) in (
        (tiles_BGP, (pairs[:, 0] // query_tile, pairs[:, 1] // key_tile)),
        (tiles_BGP.swapaxes(1, 2), (pairs[:, 1] // key_tile, pairs[:, 0] // query_tile)),
    ):
        start, end = (np.asarray(x)[0] for x in fused._stretches(tiles))
        assert (start[held] <= passing).all()
        assert (passing < end[held]).all()


def test_no_tile_passes_that_blocks_or_clips_hide():
    """Two clips of two blocks each: of 16 pairs of blocks, 6 are visible."""
    ids = jnp.repeat(jnp.asarray([[1, 2]], jnp.int32), 256, axis=1)
    queries, keys = fused._places(Visibility(ids, ids, 128), 64)
    tiles = fused._may_see(queries, keys, 64, 32)
    for visible in (tiles, tiles.swapaxes(1, 2)):
        start, end = fused._stretches(visible)
        assert int(jnp.sum(end - start)) == 6 * 2 * 4


def test_a_query_tile_that_sees_nothing_runs_over_no_keys():
    queries = jnp.full((1, 64), 1, jnp.int32)
    keys = jnp.full((1, 64), 2, jnp.int32)
    qkv = [jnp.ones((1, 1, 64, 16))] * 3
    out, lse = fused.FusedKernel(interpret=True).forward(*qkv, Visibility(queries, keys))
    assert np.isfinite(np.asarray(out)).all()
    assert (np.asarray(lse) < -1e29).all()


def test_half_precision_uses_its_own_tiles():
    """Longer than the tiles of 2-byte types, against the kernel in plain XLA of the same dtype."""
    rng = np.random.default_rng(5)
    *qkv, cotangent = (
        jnp.asarray(rng.normal(size=(1, 1, 384, 32)), jnp.bfloat16) for _ in range(4)
    )
    ids = jnp.asarray(np.repeat([[1, 2]], 192, axis=1), jnp.int32)
    seen = Visibility(ids, ids, 128)
    results = []
    for kernel in (fused.FusedKernel(interpret=True), BlockwiseKernel()):

        @jax.jit
        def run(qkv, cotangent, kernel=kernel):
            out, pull = jax.vjp(lambda *qkv: flash_attention(kernel, *qkv, seen), *qkv)
            return out, *pull(cotangent)

        results.append([np.asarray(x, np.float32) for x in run(qkv, cotangent)])
    for got, want in zip(*results, strict=True):
        # Weights are rounded (2^-9) before one kernel or the other has normalised them.
        np.testing.assert_allclose(got, want, atol=0.03, rtol=0)


@pytest.mark.parametrize(
    ("shape", "dtype", "fix"),
    [
        ((1, 16, 1, 192), "float32", r"width 192.*model\.heads"),
        ((1, 16, 1, 16), "float64", r"float64.*compute\.dtype"),
        ((1, 2**20, 17, 128), "bfloat16", r"mesh\.\*.*blockwise"),
    ],
)
def test_what_it_cannot_take_is_named_with_the_fix(shape, dtype, fix):
    array = jax.ShapeDtypeStruct((shape[0], shape[2], shape[1], shape[3]), np.dtype(dtype))
    with pytest.raises(UsageError, match=fix):
        fused.check_fused(array, array)


def test_auto_does_not_choose_it_before_it_is_measured():
    assert make_kernel("auto", "gpu") == BlockwiseKernel()
    assert make_kernel("fused", "gpu") == fused.FusedKernel(interpret=False)
    assert make_kernel("fused", "cpu") == fused.FusedKernel(interpret=True)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("tokens_per_block", [4096, 100])
def test_it_lowers_for_cuda(dtype, tokens_per_block):
    """Forward and backward become three Triton kernels, one program a tile, head and row."""
    from jax._src.mesh import AbstractDevice  # no public way to describe a GPU that is not here

    gpu = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    mesh = AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=gpu)
    array = jax.ShapeDtypeStruct((2, 8192, 8, 128), np.dtype(dtype))
    ids = jax.ShapeDtypeStruct((2, 8192), jnp.int32)

    def run(query, key, value, grad, ids):
        places = SequenceLayout(jnp.arange(8192), ids, tokens_per_block)
        return value_and_grads((query, key, value, grad), places, "fused")

    with use_abstract_mesh(mesh):
        lowered = jax.jit(run).trace(*[array] * 4, ids).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert text.count("@__gpu$xla.gpu.triton(") == 3
    for name in ("forward_kernel", "query_grad_kernel", "key_grad_kernel"):
        assert f'name = "{name}"' in text
    held = (128, 64, 64) if dtype == "bfloat16" else (64, 32, 32)
    programs = [int(n) for n in re.findall(r"grid_x = (\d+)", text)]
    assert programs == [8192 // tokens for tokens in held]
    # Nothing of the size of all scores: the largest array is an input in float32.
    sizes = [
        np.prod([int(n) for n in shape.split("x")])
        for shape in re.findall(r"tensor<((?:\d+x)+\d+)xf32>", text)
    ]
    assert max(sizes) == 2 * 8192 * 8 * 128
