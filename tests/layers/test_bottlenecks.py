"""FSQ and VAE against closed forms, and codebook statistics against numpy."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.extend.core import jaxprs_in_params

from elastictok_jax.layers.bottlenecks import FSQ, VAE
from elastictok_jax.layers.codebook import codebook_counts, codebook_use

PUBLISHED = FSQ((8, 8, 8, 5, 5, 5))
level_lists = st.sampled_from([(2,), (3, 2), (5, 4), (8, 8, 8, 5, 5, 5), (7, 2, 6)])
floats = st.floats(-1e4, 1e4, width=32)


@given(levels=level_lists, data=st.data())
@settings(max_examples=60)
def test_codes_are_in_the_codebook_and_give_the_latents_back_exactly(levels, data):
    fsq = FSQ(levels)
    x = data.draw(hnp.arrays(np.float32, (1, 4, len(levels)), elements=floats))
    out = fsq(jnp.asarray(x), None)
    codes = np.asarray(out.codes)
    assert out.codes.dtype == jnp.int32 and out.kl_BS is None
    assert codes.min() >= 0 and codes.max() < fsq.code.size
    np.testing.assert_array_equal(fsq.dequantize(out.codes), out.latents)


@pytest.mark.parametrize("levels", [(2,), (3, 2), (5, 4, 3), (8, 5)])
def test_every_code_has_latents_of_its_own_that_give_it_back(levels):
    fsq = FSQ(levels)
    codes = jnp.arange(fsq.code.size)[None]
    latents = np.asarray(fsq.dequantize(codes))[0]
    steps = [[(d - n // 2) / (n // 2) for d in range(n)] for n in levels]
    # First dim fastest: the product runs over the last listed fastest, so both are reversed.
    want = [row[::-1] for row in itertools.product(*steps[::-1])]
    np.testing.assert_array_equal(latents, np.asarray(want, np.float32))
    digits = jnp.asarray(latents[None] * (np.asarray(levels) // 2))
    np.testing.assert_array_equal(fsq.encode_digits(digits), codes)


@pytest.mark.parametrize("levels", range(2, 10))
def test_inputs_reach_all_levels_and_no_other(levels):
    x = jnp.linspace(-20, 20, 4001)[None, :, None]
    out = FSQ((levels,))(x, None)
    want = (np.arange(levels) - levels // 2) / (levels // 2)
    np.testing.assert_array_equal(np.unique(out.latents), want.astype(np.float32))
    assert np.all(np.diff(np.asarray(out.codes)[0]) >= 0)  # larger in, larger out


def test_zero_is_the_published_bound():
    """tanh(0 + shift) * half - offset is 0 for odd counts, and 0 again for even ones."""
    out = PUBLISHED(jnp.zeros((1, 1, 6)), None)
    np.testing.assert_array_equal(out.latents, np.zeros((1, 1, 6)))


@given(x=hnp.arrays(np.float32, (1, 3, 6), elements=st.floats(-3, 3, width=32)))
@settings(max_examples=30)
def test_gradient_is_that_of_the_bounded_value(x):
    """Straight through: the derivative of tanh(x + shift) * half / (levels // 2)."""
    got = jax.grad(lambda x: jnp.sum(PUBLISHED(x, None).latents))(jnp.asarray(x))
    levels = np.asarray(PUBLISHED.levels, np.float64)
    half = (levels - 1) * (1 - 1e-3) / 2
    shift = np.tan(np.where(levels % 2 == 0, 0.5, 0.0) / half)
    want = (1 - np.tanh(x.astype(np.float64) + shift) ** 2) * half / (levels // 2)
    np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-4)


def test_bfloat16_inputs_are_bottled_in_float32():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 6)), jnp.bfloat16)
    got, want = PUBLISHED(x, None), PUBLISHED(x.astype(jnp.float32), None)
    assert got.latents.dtype == jnp.float32
    np.testing.assert_array_equal(got.codes, want.codes)


def test_size_and_bits():
    assert PUBLISHED.code.size == 64_000
    assert PUBLISHED.code.bits == pytest.approx(math.log2(64_000))
    assert (PUBLISHED.encoder_dims, PUBLISHED.code.shape) == (6, ())
    assert (VAE(8).encoder_dims, VAE(8).code.shape, VAE(8).code.bits) == (16, (8,), 256.0)


def kl_by_integration(mean, log_variance):
    """Integral of q log(q / p) for one dim, q = N(mean, e^log_variance), p = N(0, 1)."""
    deviation = math.exp(0.5 * log_variance)
    z = np.linspace(mean - 12 * deviation, mean + 12 * deviation, 20_001)
    log_q = -0.5 * ((z - mean) / deviation) ** 2 - math.log(deviation * math.sqrt(2 * math.pi))
    log_p = -0.5 * z**2 - math.log(math.sqrt(2 * math.pi))
    return np.trapezoid(np.exp(log_q) * (log_q - log_p), z)


@given(
    means=st.lists(st.floats(-4, 4), min_size=2, max_size=2),
    log_variances=st.lists(st.floats(-6, 3), min_size=2, max_size=2),
)
@settings(max_examples=30)
def test_kl_is_the_integral_summed_over_dims(means, log_variances):
    out = VAE(2)(jnp.asarray([[[*means, *log_variances]]], jnp.float32), None)
    want = sum(kl_by_integration(m, v) for m, v in zip(means, log_variances, strict=True))
    assert out.kl_BS.shape == (1, 1)
    assert float(out.kl_BS[0, 0]) == pytest.approx(want, abs=1e-4, rel=1e-5)


def test_vae_without_keys_is_its_mean():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 6)), jnp.float32)
    out = VAE(3)(x, None)
    np.testing.assert_array_equal(out.latents, x[..., :3])
    np.testing.assert_array_equal(out.codes, x[..., :3])
    np.testing.assert_array_equal(VAE(3).dequantize(out.codes), out.latents)


def test_vae_row_is_a_function_of_its_own_key():
    x = jnp.asarray(np.random.default_rng(2).normal(size=(3, 5, 6)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 3)
    latents = np.asarray(VAE(3)(x, keys).latents)
    np.testing.assert_array_equal(latents, VAE(3)(x, keys).latents)
    alone = VAE(3)(x[1:2], keys[1:2]).latents
    np.testing.assert_array_equal(latents[1:2], alone)
    other = np.asarray(VAE(3)(x, keys[::-1]).latents)
    assert np.all(latents[[0, 2]] != other[[0, 2]])
    np.testing.assert_array_equal(latents[1], other[1])


def test_vae_samples_have_the_mean_and_deviation_asked_for():
    mean, log_variance, tokens = 0.7, -1.2, 200_000
    x = jnp.broadcast_to(jnp.array([mean, log_variance], jnp.float32), (1, tokens, 2))
    latents = np.asarray(VAE(1)(x, jax.random.split(jax.random.key(3), 1)).latents, np.float64)
    deviation = math.exp(0.5 * log_variance)
    assert abs(latents.mean() - mean) < 5 * deviation / math.sqrt(tokens)
    assert abs(latents.std() - deviation) < 5 * deviation / math.sqrt(2 * tokens)


def test_vae_is_finite_for_absurd_log_variances():
    x = jnp.array([[[0.0, 1e6], [0.0, -1e6]]], jnp.float32)

    def total(x):
        out = VAE(1)(x, jax.random.split(jax.random.key(0), 1))
        return jnp.sum(out.latents) + jnp.sum(out.kl_BS)

    value, grad = jax.value_and_grad(total)(x)
    assert np.isfinite(value) and np.isfinite(grad).all()


@given(
    codes=hnp.arrays(np.int32, (2, 6), elements=st.integers(0, 9)),
    weights=hnp.arrays(np.bool_, (2, 6)),
)
@settings(max_examples=40)
def test_codebook_use_equals_numpy(codes, weights):
    counts = np.bincount(codes[weights], minlength=10)
    counted = codebook_counts(jnp.asarray(codes), jnp.asarray(weights), codebook_size=10)
    np.testing.assert_array_equal(counted, counts)
    got = codebook_use(np.asarray(counted))
    share = counts[counts > 0] / max(counts.sum(), 1)
    assert float(got["usage"]) == pytest.approx(np.mean(counts > 0), abs=1e-6)
    entropy = -np.sum(share * np.log(share))
    assert float(got["perplexity"]) == pytest.approx(np.exp(entropy), rel=1e-5)


def array_sizes(jaxpr):
    """Sizes of every value of a jaxpr, inner jaxprs included."""
    for equation in jaxpr.eqns:
        yield from (math.prod(v.aval.shape) for v in (*equation.invars, *equation.outvars))
        for inner in jaxprs_in_params(equation.params):
            yield from array_sizes(inner)


def test_codebook_counts_never_hold_tokens_times_codes():
    tokens, codes = 1_000_000, 64_000
    traced = jax.make_jaxpr(lambda c, w: codebook_counts(c, w, codebook_size=codes))(
        jax.ShapeDtypeStruct((1, tokens), jnp.int32), jax.ShapeDtypeStruct((1, tokens), bool)
    )
    largest = max(array_sizes(traced.jaxpr))
    assert tokens <= largest <= 2 * tokens
