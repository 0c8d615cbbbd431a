"""Allocation of a total: against a plain dynamic programme, at size, and on a stream."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from elastictok_jax.errors import UsageError
from elastictok_jax.tokenizer import allocation
from elastictok_jax.tokenizer.allocation import BudgetPlanner, allocate, interpolate_curves

LOW = 3
WHOLE = st.integers(-4, 4).map(float)
NUMBERS = st.one_of(
    WHOLE,
    st.sampled_from([0.0, 1e-300, 1e-12, 1e12, 1e300, -1e300]),
    st.floats(-1e6, 1e6),
    st.floats(-40, 40).map(lambda power: 10.0**power),
)


@st.composite
def problems(draw, values):
    """(curves [N, M], total): any curves, copies of one curve, falling, or straight ones."""
    blocks, lengths = draw(st.integers(1, 7)), draw(st.integers(1, 9))
    shape = draw(st.sampled_from(["any", "copies", "falling", "straight"]))
    row = st.lists(values, min_size=lengths, max_size=lengths)
    rows = draw(st.lists(row, min_size=blocks, max_size=blocks))
    if shape == "copies":
        rows = [rows[0]] * blocks
    if shape == "falling":
        rows = [sorted(each, reverse=True) for each in rows]
    if shape == "straight":
        rows = [[-each[0] * index for index in range(lengths)] for each in rows]
    total = draw(st.integers(blocks * LOW, blocks * (LOW + lengths - 1)))
    return np.array(rows), total


def least_sum(curves, total):
    """The oracle: the least sum for every total, block after block, length after length."""
    best = {0: 0.0}
    for curve in curves.tolist():
        longer = {}
        for used, cost in best.items():
            for length, error in enumerate(curve, start=LOW):
                if cost + error < longer.get(used + length, np.inf):
                    longer[used + length] = cost + error
        best = longer
    return best[total]


def solve(curves, total):
    return allocate(curves, total=total, low=LOW, high=LOW + curves.shape[1] - 1)


def summed(curves, lengths, low=LOW):
    return float(curves[np.arange(len(curves)), lengths - low].sum())


def check_lengths(result, curves, total):
    assert result.lengths.dtype == np.int32 and result.lengths.shape == (len(curves),)
    assert result.lengths.sum() == total
    assert result.lengths.min() >= LOW and result.lengths.max() < LOW + curves.shape[1]


@settings(max_examples=400)
@given(problems(WHOLE))
@example((np.array([[3.0, 0.0, 2.0]] * 5), 5 * LOW + 5))  # two moves at once or none
def test_whole_numbers_are_allocated_exactly(problem):
    curves, total = problem
    result = solve(curves, total)
    check_lengths(result, curves, total)
    assert summed(curves, result.lengths) == least_sum(curves, total)
    assert result.is_optimal and result.distortion == summed(curves, result.lengths)


@settings(max_examples=400)
@given(problems(NUMBERS))
def test_any_curves_are_allocated_to_rounding(problem):
    curves, total = problem
    result = solve(curves, total)
    check_lengths(result, curves, total)
    rounding = 1e-14 * np.abs(curves).max(axis=1).sum()
    assert abs(summed(curves, result.lengths) - least_sum(curves, total)) <= rounding
    assert result.is_optimal


@settings(max_examples=200)
@given(problems(WHOLE))
def test_where_the_gap_stays_open_the_bound_says_so(problem):
    curves, total = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocation, "MAX_ADDITIONS", 0)
        result = solve(curves, total)
    check_lengths(result, curves, total)
    least = least_sum(curves, total)
    assert result.lower_bound <= least + 1e-12 and least <= result.distortion
    if result.is_optimal:
        assert result.distortion == least


def test_an_open_gap_is_reported(monkeypatch):
    monkeypatch.setattr(allocation, "MAX_ADDITIONS", 0)
    stairs = np.repeat(-np.floor(np.arange(8) / 3)[None], 5, axis=0)
    result = solve(stairs, 5 * LOW + 7)
    assert not result.is_optimal and result.lower_bound < result.distortion == -2


def noisy_power_laws(rng, *, blocks, lengths):
    """Distortion as a power of the length, with noise that makes it neither falling nor convex."""
    scale, power = np.exp(rng.normal(size=(blocks, 1))), rng.uniform(0.3, 1.5, (blocks, 1))
    noise = np.exp(0.02 * rng.normal(size=(blocks, lengths)))
    return scale * np.arange(1, lengths + 1) ** -power * noise


def dual_bound(curves, spend):
    """The highest Lagrangian bound, by ternary search over the price."""
    offsets = np.arange(curves.shape[1])

    def bound(price):
        return (curves + price * offsets).min(axis=1).sum() - price * spend

    left, right = 0.0, float(np.ptp(curves))
    for _ in range(90):
        one, two = left + (right - left) / 3, right - (right - left) / 3
        left, right = (one, right) if bound(one) < bound(two) else (left, two)
    return bound(left)


@pytest.mark.parametrize("share", [0.02, 0.25, 0.8])
def test_hundreds_of_blocks_and_thousands_of_lengths(share):
    curves = noisy_power_laws(np.random.default_rng(5), blocks=500, lengths=2000)
    spend = int(share * 500 * 1999)
    result = allocate(curves, total=spend + 500, low=1, high=2000)
    assert result.is_optimal and result.lengths.sum() == spend + 500
    assert result.distortion == pytest.approx(summed(curves, result.lengths, low=1), rel=1e-12)
    bound = dual_bound(curves, spend)
    assert bound * (1 - 1e-9) <= result.distortion <= bound * (1 + 1e-3)


@pytest.mark.parametrize("kind", ["straight", "flat", "copies", "plateaus", "noise"])
def test_ties_and_plateaus_at_size(kind):
    rng = np.random.default_rng(6)
    curves = {
        "straight": np.repeat(np.linspace(1, 0, 2000)[None], 500, axis=0),
        "flat": np.zeros((500, 2000)),
        "copies": np.repeat(noisy_power_laws(rng, blocks=1, lengths=2000), 300, axis=0),
        "plateaus": -np.cumsum(rng.random((500, 2000)) < 0.004, axis=1) * 1.0,
        "noise": rng.normal(size=(500, 2000)),
    }[kind]
    total = 417 * len(curves) + 13
    result = allocate(curves, total=total, low=1, high=2000)
    assert result.is_optimal and result.lengths.sum() == total
    assert result.distortion >= dual_bound(curves, total - len(curves)) - 1e-9


@pytest.mark.parametrize("total", [11, 33])
def test_a_total_out_of_reach_is_refused(total):
    with pytest.raises(UsageError, match=r"\[12, 32\]"):
        allocate(np.zeros((4, 6)), total=total, low=3, high=8)


def test_curves_that_cannot_be_used_are_refused():
    with pytest.raises(UsageError, match="one row of 6"):
        allocate(np.zeros((4, 5)), total=12, low=3, high=8)
    with pytest.raises(UsageError, match="block 1 is not finite"):
        allocate(np.array([[1.0, 0.0], [1.0, np.nan]]), total=3, low=1, high=2)
    with pytest.raises(UsageError, match="low <= high"):
        allocate(np.zeros((4, 5)), total=12, low=3, high=2)


def test_interpolation_is_straight_in_logs():
    """Blocks with other points each: a power law comes back exactly; flat beyond the ends."""
    at = np.arange(4, 65)
    curves = interpolate_curves(
        [([16, 4, 64], [2.0 / 16, 2.0 / 4, 2.0 / 64]), ([8, 32], [0.5, 0.25]), ([2], [0.1])],
        low=4,
        high=64,
    )
    np.testing.assert_allclose(curves[0], 2.0 / at, rtol=1e-12)
    np.testing.assert_allclose(curves[1], 0.5 * np.sqrt(8 / np.clip(at, 8, 32)), rtol=1e-12)
    np.testing.assert_array_equal(curves[2], 0.1)
    assert curves[1, 0] == 0.5 and curves[1, -1] == 0.25


def test_interpolation_with_errors_of_zero():
    """Towards a zero straight in log(length) and error; between zeros zero."""
    (curve,) = interpolate_curves(
        [([1, 16, 4, 64, 256], [3.0, 0.0, 2.0, 0.0, 1.0])], low=1, high=256
    )
    at = np.arange(1, 257)
    np.testing.assert_allclose(curve[:4], 3 * at[:4] ** -(np.log(1.5) / np.log(4)), rtol=1e-12)
    np.testing.assert_allclose(curve[3:16], 2 - np.log2(at[3:16] / 4), atol=1e-12)
    assert not curve[15:64].any()
    np.testing.assert_allclose(curve[63:], np.log2(at[63:] / 64) / 2, atol=1e-12)


@settings(max_examples=100)
@given(
    st.dictionaries(st.integers(1, 40), st.sampled_from([0.0, 1e-300, 0.1, 7.0, 1e300]), min_size=1)
)
def test_interpolation_keeps_what_was_measured(points):
    (curve,) = interpolate_curves([(list(points), list(points.values()))], low=5, high=30)
    assert np.isfinite(curve).all() and curve.min() >= 0
    assert curve.max() <= max(points.values()) * (1 + 1e-9)
    for length, error in points.items():
        if 5 <= length <= 30:
            assert curve[length - 5] == error


@pytest.mark.parametrize(
    "points", [([], []), ([4, 4], [1, 1]), ([0], [1]), ([4], [-1.0]), ([4], [np.inf]), ([4], [])]
)
def test_points_that_cannot_be_used_are_refused(points):
    with pytest.raises(UsageError, match="block 1 has errors"):
        interpolate_curves([([4], [1.0]), points], low=1, high=8)


@st.composite
def streams(draw):
    """(curves, budget): any curves and any account, the number of blocks known or not."""
    curves, _ = draw(problems(NUMBERS))
    curves = np.concatenate([curves] * draw(st.integers(1, 4)))
    high = LOW + curves.shape[1] - 1
    budget = BudgetPlanner(
        draw(st.one_of(st.floats(LOW, high), st.fractions(LOW, high, max_denominator=50))),
        LOW,
        high,
        reserve=draw(st.integers(0, 20)),
        window=draw(st.integers(1, 6)),
        blocks=draw(st.sampled_from([None, len(curves)])),
    )
    return curves, budget


@settings(max_examples=300)
@given(streams())
def test_a_stream_never_passes_its_account(stream):
    curves, budget = stream
    target = Fraction(budget.tokens_per_block)
    used = 0
    for block, curve in enumerate(curves, start=1):
        length = budget.next_length(curve)
        assert budget.low <= length <= budget.high
        used += length
        assert used <= float(target * block + budget.reserve) + 1e-5
    assert (budget.used, budget.done) == (used, len(curves))
    if budget.blocks is not None:
        if isinstance(budget.tokens_per_block, Fraction):
            assert used == target * len(curves) // 1
        with pytest.raises(UsageError, match="have their lengths"):
            budget.next_length(curves[0])


@settings(max_examples=100)
@given(blocks=st.integers(1, 40), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_a_known_stream_meets_its_total_exactly(blocks, share, seed):
    low, high = 4, 50
    total = blocks * low + round(share * blocks * (high - low))
    budget = BudgetPlanner(Fraction(total, blocks), low, high, reserve=60, window=16, blocks=blocks)
    curves = noisy_power_laws(np.random.default_rng(seed), blocks=blocks, lengths=high - low + 1)
    assert sum(budget.next_length(curve) for curve in curves) == total


def mixed_stream(rng, *, blocks, lengths):
    """Scenes of about 15 blocks, still, ordinary or busy, in no order."""
    scale, power, scene = np.array([0.02, 0.5, 4.0]), np.array([1.2, 0.7, 0.5]), 0
    curves = []
    for _ in range(blocks):
        if rng.random() < 0.1:
            scene = rng.integers(3)
        noise = np.exp(0.3 * rng.normal() + 0.02 * rng.normal(size=lengths))
        curves.append(scale[scene] * np.arange(1, lengths + 1) ** -power[scene] * noise)
    return np.array(curves)


@pytest.mark.parametrize("known", ["known", "unknown"])
def test_a_mixed_stream_comes_near_the_best_in_hindsight(known):
    """Even use costs 1.5 times the best allocation of the same total here; knowing only the past
    costs less than 1.2 times.
    """
    blocks, low, high, target = 2000, 16, 256, 64
    curves = mixed_stream(np.random.default_rng(0), blocks=blocks, lengths=high)[:, low - 1 :]
    budget = BudgetPlanner(
        float(target), low, high, reserve=16 * target, blocks=blocks if known == "known" else None
    )
    lengths = np.array([budget.next_length(curve) for curve in curves])
    best = allocate(curves, total=int(lengths.sum()), low=low, high=high)
    even = float(curves[:, target - low].sum())
    spent = summed(curves, lengths, low=low)
    assert best.is_optimal and best.distortion <= spent
    assert spent < 1.2 * best.distortion
    assert spent < 0.8 * even
    assert abs(lengths.mean() - target) < 0.02 * target
    again = BudgetPlanner(float(target), low, high, reserve=16 * target, blocks=budget.blocks)
    assert [again.next_length(curve) for curve in curves[:300]] == lengths[:300].tolist()


@pytest.mark.parametrize("kind", ["straight", "flat", "cliff"])
def test_the_mean_use_of_a_stream_of_ties_is_the_target(kind):
    """Curves that are all the same and have no one best length at the price."""
    at = np.arange(100)
    curve = {"straight": -1e-3 * at, "flat": 0.0 * at, "cliff": (at < 50) - 1e-3 * at}[kind]
    budget = BudgetPlanner(33.5, 1, 100, reserve=100, window=64)
    used = [budget.next_length(curve) for _ in range(3000)]
    assert np.mean(used) == pytest.approx(33.5, rel=0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens_per_block": 9.5}, r"9.5 tokens a block: give one in \[2, 9\]"),
        ({"tokens_per_block": float("nan")}, "nan tokens a block"),
        ({"reserve": -1}, "reserve -1"),
        ({"window": 0}, "window 0"),
        ({"blocks": 0}, "blocks 0"),
        ({"low": 0}, "low <= high"),
    ],
)
def test_a_budget_out_of_range_is_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        BudgetPlanner(**{"tokens_per_block": 4, "low": 2, "high": 9, "reserve": 8} | changes)
