"""Kernels as parts of a whole: rectangles of queries and keys, tiles, and what they leave out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastictok_jax.layers.attention.blockwise import BlockwiseKernel, blockwise_visible_tiles
from elastictok_jax.layers.attention.dense import DenseKernel, dense_attention
from elastictok_jax.layers.attention.fused import FusedKernel
from elastictok_jax.layers.attention.kernel import HIDDEN_SCORE, Visibility, flash_attention
from elastictok_jax.layers.attention.splash import SplashKernel
from elastictok_jax.layers.attention.tile import merge_softmax

B, S, H, K = 2, 330, 2, 8
KERNELS = {
    "dense": DenseKernel(),
    "blockwise": BlockwiseKernel(64, 96),
    "splash": SplashKernel(interpret=True),
    "fused": FusedKernel(interpret=True),
}
# Whole and partial blocks; shorter and longer than a tile; with and without divisors.
LENGTHS = (48, 64, 100, 128, 210, 330)


def arrays(count, seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=(B, H, S, K)), dtype) for _ in range(count)]


def some_ids(seed=0):
    return jnp.asarray(np.sort(np.random.default_rng(seed).integers(0, 4, (B, S))), jnp.int32)


@jax.jit
def reference(qkv, cotangent, ids, mask_ST):
    """dense_attention with heads first, and its gradients; the mask is no part of the program."""

    def dense(*qkv):
        out = dense_attention(
            *(x.swapaxes(1, 2) for x in qkv),
            query_segments_BS=ids,
            key_segments_BT=ids,
            rank_mask_BST=mask_ST,
        )
        return out.swapaxes(1, 2)

    out, pull = jax.vjp(dense, *qkv)
    return out, *pull(cotangent)


def block_mask(length, first=0):
    block_S = (first + np.arange(S)) // length
    return jnp.asarray(block_S[None, :] <= block_S[:, None])


def value_and_pull(f, arrays, cotangent):
    """(f(*arrays), its gradients under a cotangent), compiled as one program."""

    @jax.jit
    def run(arrays, cotangent):
        out, pull = jax.vjp(f, *arrays)
        return out, *pull(cotangent)

    return run(arrays, cotangent)


def assert_close(got, want, tolerance=1e-5):
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(
            np.asarray(ours, np.float32), np.asarray(theirs, np.float32), atol=tolerance, rtol=0
        )


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("length", LENGTHS)
def test_forward_and_gradient_equal_the_reference(kernel, length):
    *qkv, cotangent = arrays(4)
    ids = some_ids()
    seen, mask_ST = Visibility(ids, ids, length), block_mask(length)
    got = value_and_pull(lambda *qkv: flash_attention(kernel, *qkv, seen), qkv, cotangent)
    want = reference(qkv, cotangent, ids, mask_ST)
    assert_close(got, want)


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_blocks_may_begin_at_another_place_in_every_row(kernel):
    *qkv, cotangent = arrays(4, seed=1)
    ids, first = some_ids(1), (70, 5)
    seen = Visibility(ids, ids, 100, jnp.asarray(first))
    got = value_and_pull(lambda *qkv: flash_attention(kernel, *qkv, seen), qkv, cotangent)
    for row in range(B):
        alone = slice(row, row + 1)
        mask_ST = block_mask(100, first[row])
        want = reference([x[alone] for x in qkv], cotangent[alone], ids[alone], mask_ST)
        assert_close([x[alone] for x in got], want)


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_parts_of_the_keys_add_up_to_the_whole(kernel):
    """Under the log-sum-exp of all keys; also where a query sees nothing of a part."""
    query, key, value, cotangent = arrays(4, seed=2)
    ids, cut = some_ids(2), 131
    parts = [
        (key[:, :, keys], value[:, :, keys], Visibility(ids, ids[:, keys]))
        for keys in (slice(0, cut), slice(cut, S))
    ]
    forward, backward = jax.jit(kernel.forward), jax.jit(kernel.backward)
    results = [forward(query, *part) for part in parts]
    lowest = jnp.min(jnp.stack([lse for _, lse in results]))
    assert lowest < HIDDEN_SCORE / 10  # a clip that lies in one part only
    assert np.isfinite(np.asarray(results[0][0])).all()
    out, lse = merge_softmax(*results[0], *results[1])
    grads = [
        backward(query, *part, out_BHSK=out, lse_BHS=lse, grad_BHSK=cotangent) for part in parts
    ]
    together = [grads[0][0] + grads[1][0]]
    together += [jnp.concatenate(halves, 2) for halves in zip(*(g[1:] for g in grads), strict=True)]
    want = reference([query, key, value], cotangent, ids, None)
    assert_close((out, *together), want)


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_bfloat16_is_off_by_its_rounding(kernel):
    """Two roundings (2^-9 each) of values up to 4 and of gradients up to a few units."""
    *qkv, cotangent = arrays(4, seed=3, dtype=jnp.bfloat16)
    ids = some_ids(3)
    exact = [x.astype(jnp.float32) for x in qkv]
    seen, mask_ST = Visibility(ids, ids, 64), block_mask(64)
    got = value_and_pull(lambda *qkv: flash_attention(kernel, *qkv, seen), qkv, cotangent)
    exactly = exact, cotangent.astype(jnp.float32)
    want = reference(*exactly, ids, mask_ST)
    assert got[0].dtype == jnp.bfloat16
    assert_close(got, want, tolerance=0.03)


@given(
    tokens=st.integers(1, 700),
    length=st.integers(1, 700),
    queries=st.integers(64, 256),
    keys=st.integers(1, 256),
)
@settings(max_examples=200)
def test_tiles_cover_what_is_visible_once(tokens, length, queries, keys):
    ids = jnp.zeros((1, tokens), jnp.int32)
    seen = Visibility(ids, ids, length)
    count = np.zeros((tokens, tokens), int)
    block = np.arange(tokens) // length
    visible = block[None, :] <= block[:, None]
    for rows, columns in blockwise_visible_tiles(
        BlockwiseKernel(queries, keys), tokens, tokens, seen
    ):
        part = np.ix_(rows, columns)
        count[part] += 1
        assert visible[part].any()
        if not seen.blocks_hide(rows, columns):
            assert visible[part].all()
    assert (count[visible] == 1).all()
    assert count.max() == 1


@pytest.mark.parametrize("length", [64, 128, 192, 512, 1024, 4096])
def test_no_hidden_score_is_computed_where_blocks_are_tiles(length):
    tokens = 4 * length
    ids = jnp.zeros((1, tokens), jnp.int32)
    tiles = blockwise_visible_tiles(BlockwiseKernel(), tokens, tokens, Visibility(ids, ids, length))
    assert sum(len(rows) * len(columns) for rows, columns in tiles) == 10 * length**2


def temporary_bytes(tokens):
    """Of forward and backward at 256 tokens a block, by the compiler's count."""
    shape = jax.ShapeDtypeStruct((1, 2, tokens, 16), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)

    def total(query, key, value, ids):
        return flash_attention(
            BlockwiseKernel(), query, key, value, Visibility(ids, ids, 256)
        ).sum()

    compiled = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(shape, shape, shape, ids).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_grows_with_the_sequence_not_with_its_square():
    assert temporary_bytes(32768) < 2.2 * temporary_bytes(16384)


def some_ranks(seed=0):
    """Patches of rank 0, and registers that are mixed among them."""
    ranks = np.random.default_rng(seed).integers(0, 7, (B, S))
    return jnp.asarray(np.where(ranks > 3, 0, ranks), jnp.int32)


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_ranks_forward_and_gradient_equal_the_reference(kernel):
    *qkv, cotangent = arrays(4)
    ids, ranks = some_ids(), some_ranks()
    seen = Visibility(ids, ids, query_ranks_BS=ranks, key_ranks_BT=ranks)
    mask_BST = ranks[:, None, :] <= ranks[:, :, None]
    got = value_and_pull(lambda *qkv: flash_attention(kernel, *qkv, seen), qkv, cotangent)
    want = reference(qkv, cotangent, ids, mask_BST)
    assert_close(got, want)


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("length", [64, 100])
def test_blocks_as_ranks_are_blocks(kernel, length):
    *qkv, cotangent = arrays(4)
    ids = some_ids()
    ranks = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32) // length, (B, S))
    by_rank = Visibility(ids, ids, query_ranks_BS=ranks, key_ranks_BT=ranks)
    results = [
        value_and_pull(lambda *qkv, v=v: flash_attention(kernel, *qkv, v), qkv, cotangent)
        for v in (by_rank, Visibility(ids, ids, length))
    ]
    assert_close(*results)
