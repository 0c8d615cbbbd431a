"""Searches for the fewest tokens with which a block meets a target (paper, section 3.4).

A search is a generator: it yields lengths to measure, is sent their errors, and returns the length
it chose, always one that it measured. It is independent of any model.

The error is not quite monotone in the number of tokens, so only `full` proves that no shorter
length meets the target, or that no length does. The others give up on a target once the full
length and the most promising shorter ones have missed it.
"""

import dataclasses
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

Search = Generator[Sequence[int], Sequence[float], int]

BINS = 100  # lengths of the paper's binned search
AT_ONCE = 16  # lengths that the full search requests in one call
# If the full length misses the target by at most the factor NEAR, one token less and then these
# fractions of the range are tried before giving up.
NEAR, HOPES = 1.5, (0.5, 0.75)
PATIENCE = 3  # proposals that may fail to halve the open range before it is bisected
CLOSE = 0.02  # `hybrid` stops once it could save at most this fraction of the tokens
LIKELY = 0.2  # or this fraction, if it expects to save none
BELOW = 0.02  # while all meet, it undershoots its estimate by this fraction, doubled each time


@dataclasses.dataclass(frozen=True)
class SearchProblem:
    """The input of a search.

    Attributes:
      low, high: the shortest and longest allowed length.
      target: the highest acceptable error.
      guess: float64 [high - low + 1], the log of the error expected at each length.
    """

    low: int
    high: int
    target: float
    guess: np.ndarray


def _full_search(problem: SearchProblem) -> Search:
    """Finds the shortest length that meets the target, or if none does, the one of least error."""
    tried: dict[int, float] = {}
    for start in range(problem.low, problem.high + 1, AT_ONCE):
        lengths = range(start, min(start + AT_ONCE, problem.high + 1))
        tried |= zip(lengths, (yield lengths), strict=True)
        if min(tried.values()) <= problem.target:
            break
    return _best_length(tried, problem.target)


def _binned_search(problem: SearchProblem) -> Search:
    """Finds the shortest of about BINS log-spaced lengths that meets the target."""
    lengths = log_spaced(problem.low, problem.high, count=BINS)
    tried = dict(zip(lengths, (yield lengths), strict=True))
    return _best_length(tried, problem.target)


def _binary_search(problem: SearchProblem) -> Search:
    """Finds a length that meets the target in about log2(high - low) sequential measurements."""

    def propose(gap: range, tried: Mapping[int, float]) -> int:
        return gap[len(gap) // 2] if tried else problem.high

    return (yield from _narrow(problem, propose, close=0.0))


def _regression_search(problem: SearchProblem) -> Search:
    """Returns the first length at which the guess meets the target, whatever its actual error."""
    length = _first_below(problem, problem.guess, problem.low, problem.high)
    yield [length]
    return length


def _verified_regression_search(problem: SearchProblem) -> Search:
    """Starts as `_regression_search`, then corrects the guess until a length meets the target."""

    def propose(gap: range, tried: Mapping[int, float]) -> int:
        expected = correct_search_guess(problem.guess, tried, low=problem.low)
        return _first_below(problem, expected, gap[0], gap[-1])

    return (yield from _narrow(problem, propose, close=1.0))


def _hybrid_search(problem: SearchProblem) -> Search:
    """Follows the guess, corrected by the measurements, then interpolates between a miss and a hit.

    The interpolation is linear in log length and log error. If the error never rises with the
    number of tokens, the result is within CLOSE of the shortest length, or within LIKELY where the
    interpolation predicts no saving; otherwise a shorter length may be overlooked.
    """

    def propose(gap: range, tried: Mapping[int, float]) -> int | None:
        missed, met = gap[0] - 1, gap[-1] + 1
        if missed in tried and met in tried:
            log_n, log_error = np.log([met, missed]), _log([tried[met], tried[missed]])
            line = np.exp(np.interp(np.log(problem.target), log_error, log_n))
            if line >= met - 1 and len(gap) <= LIKELY * met:
                return None
            return math.ceil(line)
        expected = correct_search_guess(problem.guess, tried, low=problem.low)
        length = _first_below(problem, expected, gap[0], met)
        if met in tried:
            hits = sum(error <= problem.target for error in tried.values())
            share = BELOW * 2 ** (hits - 1)
            length = int(length * (1 - share)) if length < met else met - max(1, int(share * met))
        return length

    return (yield from _narrow(problem, propose, close=CLOSE))


class SearchMethod(NamedTuple):
    """A way to find a length.

    Attributes:
      search: starts a search.
      needs_router: whether the guess must come from a router.
    """

    search: Callable[[SearchProblem], Search]
    needs_router: bool = False


# `hybrid` does not use a router: measurements on previous blocks lead to fewer evaluations.
SEARCHES: dict[str, SearchMethod] = {
    "hybrid": SearchMethod(_hybrid_search),
    "full": SearchMethod(_full_search),
    "binned": SearchMethod(_binned_search),
    "binary": SearchMethod(_binary_search),
    "regression": SearchMethod(_regression_search, needs_router=True),
    "verified_regression": SearchMethod(_verified_regression_search, needs_router=True),
}


def _narrow(
    problem: SearchProblem,
    propose: Callable[[range, Mapping[int, float]], int | None],
    *,
    close: float,
) -> Search:
    """Measures lengths picked by `propose` between the longest miss and the shortest hit.

    Ends once at most the fraction `close` of that hit could be saved, or `propose` returns None.
    Along a flat curve proposals creep by one length at a time: the range is then bisected, or the
    full length tried if nothing has met the target yet. This bounds the search to about
    PATIENCE log2(high - low) measurements.
    """
    tried: dict[int, float] = {}
    open_: list[int] = []  # size of the open range at each proposal
    hopes = [problem.high - 1]
    hopes += [problem.low + round(share * (problem.high - problem.low)) for share in HOPES]
    while True:
        met = min((n for n, error in tried.items() if error <= problem.target), default=None)
        end = problem.high + 1 if met is None else met
        gap = range(max((n for n in tried if n < end), default=problem.low - 1) + 1, end)
        if met is not None and len(gap) <= close * met:
            break
        if gap:
            length = propose(gap, tried)
            if length is None:
                break
            open_.append(len(gap))
            if len(open_) > PATIENCE and 2 * len(gap) > open_[-1 - PATIENCE]:
                length = gap[-1] if met is None else gap[len(gap) // 2]
            length = min(max(length, gap[0]), gap[-1])
        else:  # the full length misses
            left = [n for n in hopes if n >= problem.low and n not in tried]
            if not left or min(tried.values()) > NEAR * problem.target:
                break
            length = left[0]
        tried[length] = (yield [length])[0]
    return _best_length(tried, problem.target)


def _first_below(problem: SearchProblem, expected: np.ndarray, first: int, last: int) -> int:
    """Returns the shortest length in [first, last] expected to meet the target, else `last`."""
    span = expected[first - problem.low : last - problem.low + 1]
    below = np.flatnonzero(span <= np.log(problem.target))
    return first + int(below[0]) if below.size else last


def log_spaced(low: int, high: int, *, count: int) -> list[int]:
    """Returns at most `count` log-spaced lengths from `low` to `high`."""
    steps = np.linspace(np.log(low), np.log(high), count)
    return np.unique(np.round(np.exp(steps)).astype(int)).tolist()


def _best_length(tried: Mapping[int, float], target: float) -> int:
    """Returns the shortest measured length that meets the target, or the one of least error."""
    met = [length for length, error in tried.items() if error <= target]
    return min(met) if met else min(tried, key=lambda length: (tried[length], length))


def correct_search_guess(guess: np.ndarray, tried: Mapping[int, float], *, low: int) -> np.ndarray:
    """Shifts `guess` to pass through the measurements, interpolating linearly in log length."""
    if not tried:
        return guess.copy()
    lengths = sorted(tried)
    shifts = _log([tried[n] for n in lengths]) - guess[np.asarray(lengths) - low]
    at = np.log(np.arange(low, low + len(guess)))
    return guess + np.interp(at, np.log(lengths), shifts)


def _log(errors: Sequence[float]) -> np.ndarray:
    return np.log(np.maximum(errors, 1e-12))  # avoids log(0)
