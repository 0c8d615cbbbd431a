"""The searches, over arbitrary error curves."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastictok_jax.tokenizer.search import (
    BINS,
    CLOSE,
    LIKELY,
    SEARCHES,
    SearchProblem,
    correct_search_guess,
    log_spaced,
)

curves = st.lists(st.floats(1e-6, 1), min_size=1, max_size=40)
THRESHOLD = sorted(set(SEARCHES) - {"regression"})  # those that check


def run(name, curve, *, target, low=1, guess=None):
    """The length that a search chooses, and those it measured, in order."""
    high = low + len(curve) - 1
    guess = np.zeros(len(curve)) if guess is None else np.asarray(guess)
    search = SEARCHES[name].search(SearchProblem(low, high, target, guess))
    measured: list[int] = []
    try:
        lengths = next(search)
        while True:
            measured += lengths
            lengths = search.send([curve[length - low] for length in lengths])
    except StopIteration as stop:
        return stop.value, measured


def falling(curve):
    return sorted(curve, reverse=True)


@pytest.mark.parametrize("name", SEARCHES)
@given(curve=curves, target=st.floats(1e-6, 1), low=st.integers(1, 5), seed=st.integers(0, 9))
def test_a_choice_is_in_range_and_was_measured(name, curve, target, low, seed):
    guess = np.log(np.random.default_rng(seed).uniform(1e-6, 1, len(curve)))
    length, measured = run(name, curve, target=target, low=low, guess=guess)
    assert length in measured
    assert low <= min(measured) and max(measured) <= low + len(curve) - 1
    assert len(set(measured)) == len(measured)  # nothing twice


@pytest.mark.parametrize("name", THRESHOLD)
@given(curve=curves, target=st.floats(1e-6, 1), low=st.integers(1, 5), seed=st.integers(0, 9))
def test_a_target_that_all_tokens_reach_is_never_missed(name, curve, target, low, seed):
    curve[-1] = min(curve[-1], target)
    guess = np.log(np.random.default_rng(seed).uniform(1e-6, 1, len(curve)))
    length, _ = run(name, curve, target=target, low=low, guess=guess)
    assert curve[length - low] <= target


@pytest.mark.parametrize("name", THRESHOLD)
@given(curve=curves, low=st.integers(1, 5))
def test_an_unreachable_target_gets_the_least_error_measured(name, curve, low):
    length, measured = run(name, curve, target=5e-7, low=low)
    assert low + len(curve) - 1 in measured
    assert curve[length - low] == min(curve[n - low] for n in measured)


@given(curve=curves, target=st.floats(1e-6, 1), low=st.integers(1, 5))
def test_full_is_the_minimum(curve, target, low):
    length, _ = run("full", curve, target=target, low=low)
    reaching = [low + i for i, error in enumerate(curve) if error <= target]
    assert length == (reaching[0] if reaching else low + int(np.argmin(curve)))


@given(curve=curves, tight=st.floats(1e-6, 1), loose=st.floats(1e-6, 1))
def test_full_spends_no_more_on_a_looser_target(curve, tight, loose):
    tight, loose = sorted((tight, loose))
    assert run("full", curve, target=loose)[0] <= run("full", curve, target=tight)[0]


@pytest.mark.parametrize("name", ["binary", "hybrid"])
@given(curve=curves, target=st.floats(1e-6, 1), seed=st.integers(0, 9))
def test_on_a_falling_curve_the_minimum_is_found(name, curve, target, seed):
    curve = falling(curve)
    curve[-1] = min(curve[-1], target)
    guess = np.log(np.random.default_rng(seed).uniform(1e-6, 1, len(curve)))
    length, measured = run(name, curve, target=target, guess=guess)
    least, _ = run("full", curve, target=target)
    if length > least / (1 - CLOSE):  # only where a straight line promised no saving
        assert name == "hybrid" and least <= length <= least / (1 - LIKELY)
        missed = max(n for n in measured if n < length)
        log_errors = np.log([curve[length - 1], curve[missed - 1]])
        line = np.exp(np.interp(np.log(target), log_errors, np.log([length, missed])))
        assert line >= (length - 1) * (1 - 1e-9)
    assert length >= least
    if name == "binary":
        assert length == least and len(measured) <= 1 + len(curve).bit_length()


@pytest.mark.parametrize("name", ["hybrid", "verified_regression", "regression"])
@given(curve=st.lists(st.floats(1e-6, 1), min_size=1, max_size=200), target=st.floats(1e-5, 1))
def test_a_right_guess_costs_two_measurements_at_most(name, curve, target):
    """The choice, and for hybrid the length below it."""
    curve = falling(curve)
    if curve[-1] > target:
        curve[-1] = target / 2
    length, measured = run(name, curve, target=target, guess=np.log(curve))
    if name == "hybrid":
        assert len(measured) <= 2
    else:
        assert len(measured) == 1
    # A curve that goes through the target itself may be taken for one that misses by a rounding.
    assert length <= 1 + run("full", curve, target=target)[0]


@given(
    level=st.floats(0.2, 5),
    slope=st.floats(-3, -0.2),
    wrong=st.floats(0.3, 3),
    share=st.floats(0.1, 0.9),
)
def test_hybrid_is_quick_along_a_straight_line(level, slope, wrong, share):
    """In logarithms; the guess has its slope, but stands too high or too low."""
    low, high = 16, 1024
    line = level * np.arange(low, high + 1.0) ** slope
    target = line[int(share * (high - low))]
    length, measured = run("hybrid", line, target=target, low=low, guess=np.log(wrong * line))
    least, _ = run("full", line, target=target, low=low)
    assert least <= length <= 1 + least
    assert len(measured) <= 5


@pytest.mark.parametrize("name", ["hybrid", "binary", "verified_regression"])
def test_hopes_are_few_and_only_near_the_target(name):
    """All 64 tokens miss, by little or by much; 48 would do."""
    curve = np.full(64, 1.2)
    curve[47] = 0.9
    length, _ = run(name, curve, target=1.0, guess=np.full(64, np.log(2.0)))
    assert length == 48
    length, measured = run(name, curve, target=0.85, guess=np.full(64, np.log(2.0)))
    assert length == 48 and sorted(measured) == [33, 48, 63, 64]
    _, measured = run(name, curve, target=0.7, guess=np.full(64, np.log(2.0)))
    assert measured == [64]


@pytest.mark.parametrize("name", ["hybrid", "binary", "verified_regression"])
@pytest.mark.parametrize("flat", [0.9999, 1.0001, 1.001, 1.2])
@pytest.mark.parametrize("guess", [0.0, np.nan])
def test_flat_curves_and_useless_guesses_cost_few_measurements(name, flat, guess):
    low, high = 256, 4096
    curve = flat * (np.arange(low, high + 1) / low) ** -1e-6
    for guess_curve in (np.log(curve) * 0 + guess, -0.35 * np.log(np.arange(low, high + 1))):
        _, measured = run(name, curve, target=1.0, low=low, guess=guess_curve)
        assert len(measured) <= 3 * (high - low).bit_length() + 6


@pytest.mark.parametrize("name", ["hybrid", "binary", "verified_regression"])
@given(
    curve=st.lists(st.floats(0.9, 1.1), min_size=1, max_size=400),
    target=st.floats(0.9, 1.1),
    slope=st.floats(-0.01, 0),
)
def test_measurements_are_bounded_by_the_logarithm(name, curve, target, slope):
    guess = slope * np.log(np.arange(1, len(curve) + 1))
    _, measured = run(name, curve, target=target, guess=guess)
    assert len(measured) <= 3 * len(curve).bit_length() + 6


def test_binned_measures_the_papers_number_of_lengths():
    lengths = run("binned", falling(np.linspace(0.1, 1, 3841)), target=0.5, low=256)[1]
    assert len(lengths) == BINS and lengths[0] == 256 and lengths[-1] == 4096


@given(low=st.integers(1, 50), more=st.integers(0, 500), count=st.integers(2, 60))
def test_log_spaced_lengths_ascend_from_end_to_end(low, more, count):
    lengths = log_spaced(low, low + more, count=count)
    assert lengths[0] == low and lengths[-1] == low + more
    assert all(a < b for a, b in itertools.pairwise(lengths)) and len(lengths) <= count


@given(
    tried=st.dictionaries(st.integers(3, 20), st.floats(1e-6, 10), max_size=5),
    seed=st.integers(0, 9),
)
def test_a_corrected_guess_goes_through_what_was_measured(tried, seed):
    guess = np.random.default_rng(seed).standard_normal(18)
    curve = correct_search_guess(guess, tried, low=3)
    for length, error in tried.items():
        assert np.isclose(curve[length - 3], np.log(error))
    if not tried:
        np.testing.assert_array_equal(curve, guess)
