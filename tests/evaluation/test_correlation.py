"""Correlations, against scipy."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from elastictok_jax.evaluation.correlation import pearson_correlation, spearman_correlation


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=3, max_size=20))
def test_correlations_are_scipys(points):
    x, y = (np.asarray(axis, float) for axis in zip(*points, strict=True))
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        assert pearson_correlation(x, y) is None
        return
    assert pearson_correlation(x, y) == pytest.approx(scipy.stats.pearsonr(x, y)[0], abs=1e-9)
    expected = scipy.stats.spearmanr(x, y)[0]
    assert spearman_correlation(x, y) == pytest.approx(expected, abs=1e-9)
