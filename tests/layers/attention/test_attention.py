"""Every backend against a float64 brute force, forward and gradient, and what may see what."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastictok_jax.layers.attention.api import SequenceLayout, attend_to_past, attention

BACKENDS = ("dense", "blockwise")
B, S, H, K = 2, 12, 2, 4
LENGTHS = (3, 4, 6, 12)  # tokens a block that make 4, 3, 2 and 1 blocks
# Clips of odd lengths that cross blocks, padding at the end, and a row of padding alone.
PACKED = np.array([[1] * 5 + [2] * 4 + [0] * 3, [0] * 12])
BF16_STEP = 2.0**-8  # distance of neighbouring bfloat16 values at 1


def brute_force(query, key, value, *, segments, per_block):
    """Softmax over an explicit list of visible keys, one query at a time, in float64."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    out = np.zeros_like(value)
    for b in range(query.shape[0]):
        for i in range(query.shape[1]):
            seen = [
                j
                for j in range(key.shape[1])
                if segments[b][j] == segments[b][i] and j // per_block <= i // per_block
            ]
            for h in range(query.shape[2]):
                scores = key[b, seen, h] @ query[b, i, h] / np.sqrt(query.shape[3])
                weights = np.exp(scores - scores.max())
                out[b, i, h] = weights @ value[b, seen, h] / weights.sum()
    return out


def inputs(seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=(B, S, H, K)), dtype) for _ in range(3))


def places_of(segments, per_block):
    return SequenceLayout(
        positions_S=jnp.arange(np.shape(segments)[1], dtype=jnp.int32),
        segments_BS=jnp.asarray(segments, jnp.int32),
        tokens_per_block=per_block,
    )


run = jax.jit(attention, static_argnames="backend")


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    segments=st.lists(st.lists(st.integers(0, 3), min_size=S, max_size=S), min_size=B, max_size=B),
    per_block=st.sampled_from(LENGTHS),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=40)
def test_forward_equals_brute_force_for_any_segments(backend, segments, per_block, seed):
    qkv = inputs(seed)
    got = run(*qkv, places=places_of(segments, per_block), backend=backend)
    assert got.dtype == jnp.float32
    want = brute_force(*qkv, segments=segments, per_block=per_block)
    np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("per_block", LENGTHS)
def test_packed_clips_and_padding(backend, per_block):
    qkv = inputs(0)
    got = run(*qkv, places=places_of(PACKED, per_block), backend=backend)
    want = brute_force(*qkv, segments=PACKED, per_block=per_block)
    np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5)
    assert np.isfinite(got).all()


def grads(qkv, cotangent, *, places, backend):
    def total(qkv):
        return jnp.sum(attention(*qkv, places=places, backend=backend) * cotangent)

    return jax.jit(jax.grad(total))(qkv)


def test_dense_gradient_equals_finite_differences():
    qkv, cotangent = inputs(1), np.asarray(inputs(2)[0], np.float64)
    got = grads(qkv, cotangent.astype(np.float32), places=places_of(PACKED, 4), backend="dense")
    arrays = [np.asarray(x, np.float64) for x in qkv]

    def total(changed):
        return np.sum(brute_force(*changed, segments=PACKED, per_block=4) * cotangent)

    rng, step = np.random.default_rng(3), 1e-5
    for which, array in enumerate(arrays):
        for flat in rng.choice(array.size, size=24, replace=False):
            ends = []
            for sign in (1, -1):
                moved = array.copy()
                moved.flat[flat] += sign * step
                ends.append(total([*arrays[:which], moved, *arrays[which + 1 :]]))
            want = (ends[0] - ends[1]) / (2 * step)
            np.testing.assert_allclose(np.ravel(got[which])[flat], want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("per_block", LENGTHS)
def test_blockwise_gradient_equals_dense(per_block):
    qkv, cotangent = inputs(4), inputs(5)[0]
    places = places_of(PACKED, per_block)
    want = grads(qkv, cotangent, places=places, backend="dense")
    got = grads(qkv, cotangent, places=places, backend="blockwise")
    for ours, reference in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, reference, atol=1e-5, rtol=1e-5)
        assert np.abs(reference).max() > 0.1  # there is something to compare


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_is_off_by_at_most_its_rounding(backend):
    qkv = inputs(6, jnp.bfloat16)
    got = run(*qkv, places=places_of(PACKED, 4), backend=backend)
    assert got.dtype == jnp.bfloat16
    want = brute_force(*qkv, segments=PACKED, per_block=4)
    # Half a step for the weights and half a step for the output.
    tolerance = BF16_STEP * float(jnp.max(jnp.abs(qkv[2])))
    np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=tolerance, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_far_beyond_float32_exp_stay_finite(backend):
    query, key, value = inputs(7)
    got = run(query * 1e3, key * 1e3, value, places=places_of(PACKED, 4), backend=backend)
    want = brute_force(query * 1e3, key * 1e3, value, segments=PACKED, per_block=4)
    np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("changed", "same"),
    [
        pytest.param(PACKED[0] == 2, PACKED[0] != 2, id="another clip"),
        pytest.param(PACKED[0] == 0, PACKED[0] != 0, id="padding"),
        pytest.param(np.arange(S) >= 4, np.arange(S) < 4, id="later blocks"),
        pytest.param(np.arange(S) == 8, np.arange(S) < 8, id="first token of the last block"),
    ],
)
def test_nothing_leaks(backend, changed, same):
    segments = PACKED[:1]
    places = places_of(segments, 4)
    qkv = tuple(x[:1] for x in inputs(8))
    others = tuple(x[:1] for x in inputs(9))
    mixed = tuple(
        jnp.where(changed[None, :, None, None], 100 * other, x)
        for x, other in zip(qkv, others, strict=True)
    )
    before = np.asarray(run(*qkv, places=places, backend=backend))
    after = np.asarray(run(*mixed, places=places, backend=backend))
    np.testing.assert_array_equal(before[:, same], after[:, same])
    assert np.abs(before - after)[:, changed].max() > 0.1  # the change did reach its own tokens
    # Nor does any gradient come back.
    reach = grads(
        qkv,
        jnp.asarray(same, jnp.float32)[None, :, None, None],
        places=places,
        backend=backend,
    )
    for grad in reach:
        assert not np.any(np.asarray(grad)[:, changed])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_block_sees_all_of_itself(backend):
    query, key, value = inputs(10)
    places = places_of(np.ones((B, S)), 4)
    before = run(query, key, value, places=places, backend=backend)
    after = run(query, key, value.at[:, 7].add(1.0), places=places, backend=backend)
    moved = np.abs(np.asarray(after - before)).max(axis=(0, 2, 3)) > 0
    np.testing.assert_array_equal(moved, np.arange(S) >= 4)  # token 7 is the last of block 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_last_block_may_be_partial(backend):
    qkv = inputs(12)
    got = run(*qkv, places=places_of(PACKED, 5), backend=backend)
    want = brute_force(*qkv, segments=PACKED, per_block=5)
    np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5)


def test_auto_is_blockwise_on_a_cpu():
    qkv = inputs(12)
    auto = run(*qkv, places=places_of(PACKED, 4), backend="auto")
    blockwise = run(*qkv, places=places_of(PACKED, 4), backend="blockwise")
    np.testing.assert_array_equal(auto, blockwise)


def test_errors_name_the_mend():
    qkv = inputs(13)
    with pytest.raises(ValueError, match=r"'flash'.*auto, dense, blockwise, splash"):
        attention(*qkv, places=places_of(PACKED, 4), backend="flash")


@pytest.mark.parametrize("backend", BACKENDS)
def test_registers_see_patches_and_earlier_registers(backend):
    """Four patches of rank 0 and registers of ranks 1 to 4 a clip, two clips a row."""
    ranks = np.array([[0, 0, 0, 0, 1, 2] * 2, [0, 1, 2, 3, 4, 0] * 2])
    segments = np.array([[1] * 6 + [2] * 6] * 2)
    query, key, value = inputs(5)
    places = dataclasses.replace(places_of(segments, S), ranks_BS=jnp.asarray(ranks, jnp.int32))
    got = run(query, key, value, places=places, backend=backend)
    for b, i in np.ndindex(B, S):
        sees = (segments[b] == segments[b, i]) & (ranks[b] <= ranks[b, i])
        for h in range(H):
            scores = np.asarray(key[b, sees, h]) @ np.asarray(query[b, i, h]) / np.sqrt(K)
            weights = np.exp(scores - scores.max())
            want = weights @ np.asarray(value[b, sees, h]) / weights.sum()
            np.testing.assert_allclose(got[b, i, h], want, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_block_with_ranks_sees_all_of_the_cache(backend):
    query, key, value = inputs(6)
    ranks = jnp.asarray(np.random.default_rng(0).integers(0, 3, (1, 6)), jnp.int32)
    blocks = jnp.concatenate([jnp.zeros((1, 6), jnp.int32), ranks + 1], axis=1)
    places = dataclasses.replace(places_of(np.ones((1, S)), S), ranks_BS=blocks)
    want = run(query[:1], key[:1], value[:1], places=places, backend=backend)[:, 6:]
    got = attend_to_past(
        query[:1, 6:],
        *(x[:1, 6:].swapaxes(1, 2) for x in (key, value)),
        *(x[0, :6].swapaxes(0, 1) for x in (key, value)),
        past_ids_T=jnp.ones(6, jnp.int32),
        backend=backend,
        ranks_CS=ranks,
    )
    np.testing.assert_allclose(got, want, atol=1e-5)
