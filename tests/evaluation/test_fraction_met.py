"""Fractions of blocks that meet a target, by the tokens that they may take."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastictok_jax.evaluation.fraction_met import (
    fraction_met_curve,
    fraction_met_for_tokens,
    tokens_for_fraction_met,
)

blocks = st.lists(st.tuples(st.integers(4, 64), st.booleans()), min_size=1, max_size=30)


def unzip(some):
    lengths, met = zip(*some, strict=True)
    return np.asarray(lengths), np.asarray(met)


@given(some=blocks, share=st.floats(0, 1))
def test_share_and_tokens_are_inverses(some, share):
    lengths, met = unzip(some)
    tokens, shares = fraction_met_curve(lengths, met, least=4)
    assert (np.diff(tokens) >= 0).all() and (np.diff(shares) > 0).all()
    assert shares[-1] == pytest.approx(met.mean()) and tokens[0] == 4
    needed = tokens_for_fraction_met(lengths, met, least=4, fraction=share)
    if share > met.mean() + 1e-9:
        assert needed is None
    else:
        assert needed is not None
        assert fraction_met_for_tokens(lengths, met, least=4, tokens=needed) >= share - 1e-9


@given(some=blocks)
def test_all_blocks_met_take_what_they_need(some):
    lengths, met = unzip(some)
    tokens, _ = fraction_met_curve(lengths, met, least=4)
    assert tokens[-1] == pytest.approx(np.where(met, lengths, 4).mean())
