"""Lengths have the distribution they claim and are a function of (key, block index) alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from elastictok_jax import masking

MANY = 50_000
KEY = jax.random.key(42)
RANDOM = [kind for kind in masking.MASKINGS if kind != "fixed"]


def draw(kind, *, low, high, count=MANY, key=KEY, **kwargs):
    index = jnp.arange(count, dtype=jnp.int32)
    lengths = masking.draw_lengths(key, index, kind=kind, min_tokens=low, max_tokens=high, **kwargs)
    assert lengths.dtype == jnp.int32 and lengths.shape == index.shape
    return np.asarray(lengths)


@given(
    kind=st.sampled_from(RANDOM),
    low=st.integers(1, 64),
    extra=st.integers(0, 4096),
    seed=st.integers(0, 2**31 - 1),
)
@settings(max_examples=25)
def test_lengths_are_in_range(kind, low, extra, seed):
    high = low + max(extra, low)  # so that a power of two lies between
    lengths = draw(kind, low=low, high=high, count=64, key=jax.random.key(seed))
    assert lengths.min() >= low and lengths.max() <= high
    if kind == "powers_of_two":
        assert np.all(lengths & (lengths - 1) == 0)


@pytest.mark.parametrize(("low", "high"), [(1, 1), (3, 4), (5, 24), (8, 128)])
def test_uniform_gives_every_length_its_share(low, high):
    counts = np.bincount(draw("uniform", low=low, high=high), minlength=high + 1)
    assert not counts[:low].any()
    assert counts[low] > 0 and counts[high] > 0  # both ends, exactly
    if high > low:
        assert scipy.stats.chisquare(counts[low:]).pvalue > 1e-3


def test_uniform_reaches_both_ends_of_the_published_range():
    lengths = draw("uniform", low=256, high=4096)
    assert (lengths.min(), lengths.max()) == (256, 4096)


def test_powers_of_two_are_those_in_range_equally_often():
    np.testing.assert_array_equal(masking.powers_of_two_lengths(5, 128), [8, 16, 32, 64, 128])
    np.testing.assert_array_equal(masking.powers_of_two_lengths(1, 4), [1, 2, 4])
    np.testing.assert_array_equal(masking.powers_of_two_lengths(4096, 4096), [4096])
    assert masking.powers_of_two_lengths(5, 7).size == 0
    values, counts = np.unique(draw("powers_of_two", low=5, high=128), return_counts=True)
    np.testing.assert_array_equal(values, [8, 16, 32, 64, 128])
    assert scipy.stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize(("fraction", "want"), [(0.5, 50), (0.256, 26), (1.0, 100), (0.001, 1)])
def test_fixed_is_one_length(fraction, want):
    lengths = draw("fixed", low=8, high=100, count=7, fraction=fraction)
    np.testing.assert_array_equal(lengths, np.full(7, want))


@pytest.mark.parametrize(("mean", "deviation"), [(0.5, 0.25), (0.1, 0.2), (0.9, 1.0)])
def test_truncated_normal_is_that_of_scipy(mean, deviation):
    low, high = 8, 128
    center, scale = mean * high, deviation * high
    ends = ((low - 0.5 - center) / scale, (high + 0.5 - center) / scale)
    want = scipy.stats.truncnorm(*ends, loc=center, scale=scale)
    lengths = draw("truncated_normal", low=low, high=high, mean=mean, deviation=deviation)
    error = want.std() / np.sqrt(MANY)
    assert abs(lengths.mean() - want.mean()) < 5 * error
    assert abs(lengths.std() - want.std()) < 5 * error
    # Length n stands for values within half a token of n, the ends like any other.
    edges = np.arange(low, high + 2) - 0.5
    expected = np.diff(want.cdf(edges)) * MANY
    counts = np.bincount(lengths, minlength=high + 1)[low:]
    expected *= counts.sum() / expected.sum()  # the cdf's last digits
    assert scipy.stats.chisquare(counts, expected).pvalue > 1e-3


@pytest.mark.parametrize("kind", masking.MASKINGS)
def test_a_block_is_drawn_from_its_index_alone(kind):
    """However blocks are batched, over microbatches, hosts or devices."""
    want = draw(kind, low=8, high=4096, count=24)
    for index in (0, 7, 23):
        alone = masking.draw_lengths(
            KEY, jnp.array(index), kind=kind, min_tokens=8, max_tokens=4096
        )
        assert alone.shape == () and int(alone) == want[index]
    shuffled = np.random.default_rng(0).permutation(24).reshape(4, 6)
    got = jax.jit(
        lambda index: masking.draw_lengths(KEY, index, kind=kind, min_tokens=8, max_tokens=4096)
    )(jnp.asarray(shuffled))
    np.testing.assert_array_equal(got, want[shuffled])


@pytest.mark.parametrize("kind", RANDOM)
def test_blocks_and_keys_differ(kind):
    lengths = draw(kind, low=8, high=4096, count=256)
    assert len(np.unique(lengths)) >= min(10, len(masking.powers_of_two_lengths(8, 4096)))
    other = draw(kind, low=8, high=4096, count=256, key=jax.random.key(43))
    assert np.mean(lengths != other) > 0.5
    neighbours = np.corrcoef(lengths[:-1], lengths[1:])[0, 1]
    assert abs(neighbours) < 5 / np.sqrt(256)


def test_unknown_kind_names_the_choices():
    with pytest.raises(ValueError, match=r"'zipf'.*uniform, fixed, powers_of_two"):
        draw("zipf", low=1, high=2, count=1)


@given(
    lengths=st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3), min_size=1, max_size=3)
)
@settings(max_examples=40)
def test_keep_mask_keeps_the_first_n_of_each_block(lengths):
    keep = np.asarray(masking.keep_mask(jnp.array(lengths, jnp.int32), tokens_per_block=5))
    assert keep.shape == (len(lengths), 15) and keep.dtype == bool
    want = [[t < n for n in row for t in range(5)] for row in lengths]
    np.testing.assert_array_equal(keep, want)
    np.testing.assert_array_equal(keep.reshape(-1, 3, 5).sum(axis=2), lengths)  # n, not n + 1
