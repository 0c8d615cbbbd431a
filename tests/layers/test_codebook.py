"""Use of a codebook, against counts of the same codes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastictok_jax.errors import UsageError
from elastictok_jax.layers.codebook import codebook_statistics


@given(codes=st.lists(st.lists(st.integers(0, 19), max_size=30), min_size=1, max_size=4))
def test_codebook_statistics_are_those_of_the_counts(codes):
    flat = [code for clip in codes for code in clip]
    given_arrays = (np.array(clip, np.int32) for clip in codes)
    if not flat:
        with pytest.raises(UsageError, match="no codes"):
            codebook_statistics(given_arrays, size=20)
        return
    found = codebook_statistics(given_arrays, size=20)
    share = np.array([flat.count(code) / len(flat) for code in set(flat)])
    assert found["tokens"] == len(flat)
    assert found["codes_used"] == len(set(flat))
    assert found["codebook_usage"] == pytest.approx(len(set(flat)) / 20)
    assert found["codebook_perplexity"] == pytest.approx(np.exp(-(share * np.log(share)).sum()))


def test_codebook_of_equally_frequent_codes_has_its_size_as_perplexity():
    codes = np.arange(64_000, dtype=np.uint16).reshape(80, 800)
    found = codebook_statistics(codes, size=64_000)
    assert found["codebook_perplexity"] == pytest.approx(64_000)
    assert found["codebook_usage"] == 1
    assert codebook_statistics(np.full(9, 7), size=64_000)["codebook_perplexity"] == 1


@pytest.mark.parametrize(
    ("codes", "told"),
    [
        (np.array([3, 8]), "from 3 to 8 .* 8 codes"),
        (np.array([-1, 2]), "from -1 to 2"),
        (np.zeros((2, 4), np.float32), "integers, not float32"),
    ],
)
def test_what_is_no_code_is_refused(codes, told):
    with pytest.raises(UsageError, match=told):
        codebook_statistics(codes, size=8)
