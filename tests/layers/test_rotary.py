"""Rotary embedding against float64, and what must hold at any position."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastictok_jax.layers.rotary import apply_rotary_embedding, rotary_pairs_to_halves

THETA, HEAD_WIDTH = 5e7, 128  # of the published FSQ model


def unit_vectors(seed, count=2):
    vectors = np.random.default_rng(seed).normal(size=(count, HEAD_WIDTH))
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


@jax.jit
def rotated(vectors_SK, positions_S):
    return apply_rotary_embedding(vectors_SK[None, :, None], positions_S, theta=THETA)[0, :, 0]


def score(query, key, query_position, key_position):
    both = rotated(
        jnp.asarray([query, key], jnp.float32), jnp.array([query_position, key_position])
    )
    return float(np.asarray(both[0], np.float64) @ np.asarray(both[1], np.float64))


def rotate_pairs_float64(vectors, positions):
    """The published convention: dims 2i and 2i + 1 turn by position * theta ** (-2i / K)."""
    out = np.zeros(vectors.shape)
    dims = vectors.shape[-1]
    for row, position in enumerate(positions):
        for i in range(dims // 2):
            angle = float(position) * THETA ** (-2 * i / dims)
            a, b = vectors[row, 2 * i], vectors[row, 2 * i + 1]
            out[row, 2 * i] = a * np.cos(angle) - b * np.sin(angle)
            out[row, 2 * i + 1] = a * np.sin(angle) + b * np.cos(angle)
    return out


@given(
    position=st.integers(0, 2**20),
    distance=st.integers(0, 2**20),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60)
def test_scores_depend_on_distance_alone(position, distance, seed):
    query, key = unit_vectors(seed)
    near = score(query, key, 0, distance)
    far = score(query, key, position, position + distance)
    assert far == pytest.approx(near, abs=1e-5)


def test_distance_matters():
    query, key = unit_vectors(0)
    at_zero = score(query, key, 1000, 1000)
    assert at_zero == pytest.approx(query @ key, abs=1e-5)
    assert abs(score(query, key, 1000, 1001) - at_zero) > 1e-3


@pytest.mark.parametrize(
    ("positions", "tolerance"),
    [
        (range(64), 1e-6),
        # Frequencies are whole multiples of 2^-32 turns: at position p the angle is off by at
        # most p 2^-33 turns, 8e-4 rad at a million, the same for query and key.
        (range(2**20 - 64, 2**20), 2**20 * 2.0**-33 * 2 * np.pi),
    ],
)
def test_rotation_is_the_published_one(positions, tolerance):
    vectors = unit_vectors(1, count=64)
    want = rotary_pairs_to_halves(
        jnp.asarray(rotate_pairs_float64(vectors, positions), jnp.float32)
    )
    halves = rotary_pairs_to_halves(jnp.asarray(vectors, jnp.float32))
    got = rotated(halves, jnp.asarray(positions, jnp.int32))
    np.testing.assert_allclose(got, want, atol=tolerance, rtol=0)
    norms = np.linalg.norm(np.asarray(got, np.float64), axis=-1)
    np.testing.assert_allclose(norms, 1.0, atol=1e-6)


def test_pairs_to_halves_puts_even_dims_first():
    kernel = jnp.arange(24).reshape(3, 8)
    want = np.concatenate([kernel[:, 0::2], kernel[:, 1::2]], axis=1)
    np.testing.assert_array_equal(rotary_pairs_to_halves(kernel), want)


def test_rotation_keeps_dtype_and_computes_in_float32():
    vectors = jnp.asarray(unit_vectors(2, count=3), jnp.bfloat16)
    positions = jnp.array([0, 2**20 - 1, 2**20])
    got = rotated(vectors, positions)
    assert got.dtype == jnp.bfloat16
    want = rotated(vectors.astype(jnp.float32), positions).astype(jnp.bfloat16)
    np.testing.assert_array_equal(got, want)
