"""The linear transform code: an orthonormal transform, and digits that each lower the error."""

import numpy as np
import pytest
import scipy.fft

from elastictok_jax.layers.linear_code import (
    Digit,
    PatchSpectrum,
    dct_matrix,
    deal_digits,
    decode_prefixes,
)

GRID, WIDTH = (2, 3, 4), 6


def smooth_blocks(count: int, *, seed: int) -> np.ndarray:
    """float32 [N, L, D]: patches that are like their neighbours."""
    rng = np.random.default_rng(seed)
    spectrum = rng.laplace(size=(count, *GRID, WIDTH))
    decay = np.add.outer(np.add.outer(*map(np.arange, GRID[:2])), np.arange(GRID[2]))
    spectrum *= (0.4**decay)[..., None] * 0.5 ** np.arange(WIDTH)
    patches = scipy.fft.idctn(spectrum, axes=(1, 2, 3), norm="ortho")
    return (patches.reshape(count, -1, WIDTH) + 0.3).astype(np.float32)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_dct_is_scipys(size):
    x = np.random.default_rng(0).normal(size=size)
    np.testing.assert_allclose(dct_matrix(size) @ x, scipy.fft.dct(x, norm="ortho"), atol=1e-12)
    np.testing.assert_allclose(dct_matrix(size) @ dct_matrix(size).T, np.eye(size), atol=1e-12)


def test_all_components_lose_nothing_and_energy_is_kept():
    blocks = smooth_blocks(50, seed=1)
    spectrum = PatchSpectrum.fit(blocks, grid=GRID, components=WIDTH)
    coefficients = spectrum.coefficients(blocks)
    np.testing.assert_allclose(spectrum.patches(coefficients), blocks, atol=1e-5)
    energy = np.sum((blocks - spectrum.mean_D) ** 2, axis=(1, 2))
    np.testing.assert_allclose(np.sum(coefficients**2, axis=1), energy, rtol=1e-4)


def test_fewer_components_leave_out_the_least_variance():
    blocks = smooth_blocks(400, seed=2)
    spectrum = PatchSpectrum.fit(blocks, grid=GRID, components=3)
    lost = np.mean((spectrum.patches(spectrum.coefficients(blocks)) - blocks) ** 2) * WIDTH
    moments = np.cov(blocks.reshape(-1, WIDTH).T, bias=True)
    assert lost == pytest.approx(np.linalg.eigvalsh(moments)[:3].sum(), rel=1e-3)


@pytest.mark.parametrize("digit", [Digit(0, 5, 0.5), Digit(0, 8, -0.5), Digit(0, 8, 0.5, 0.5)])
def test_a_digit_has_its_levels_and_takes_the_nearest(digit):
    values = np.linspace(-4, 4, 4001)
    made = digit.quantise(values)
    steps = np.unique(made)
    assert len(steps) == digit.levels and np.allclose(np.diff(steps), 0.5)
    np.testing.assert_allclose(np.abs(made - values), np.abs(values[:, None] - steps).min(axis=1))


def test_longer_prefixes_lower_the_error_on_other_blocks():
    train, test = smooth_blocks(400, seed=3), smooth_blocks(100, seed=4)
    spectrum = PatchSpectrum.fit(train, grid=GRID, components=WIDTH)
    digits = deal_digits(spectrum.coefficients(train), levels=(8, 5), tokens=24)
    assert len(digits) == 48 and [d.levels for d in digits[:4]] == [8, 5, 8, 5]
    assert len({d.coefficient for d in digits}) < 48  # some are refined
    counts = (1, 2, 4, 8, 16, 24)
    decoded = decode_prefixes(spectrum.coefficients(test), digits, token_digits=2, tokens=counts)
    errors = [np.mean((spectrum.patches(decoded[n]) - test) ** 2) for n in counts]
    assert (np.diff(errors) < 0).all() and errors[-1] < 0.1 * errors[0]
