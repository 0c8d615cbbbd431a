"""How many tokens a block needs for a target (paper, section 3.4).

A search is a generator: it yields lengths to measure, is sent their errors, and returns the length
that it chooses, which it has measured. It knows nothing of models.

The error is not quite monotone in the number of tokens, so only `full` proves that no shorter
length would do, or that none reaches the target at all. The others hold a target for out of reach
when all tokens miss it and so do the lengths that promised most.
"""

import dataclasses
import math
from collections.abc import Callable, Generator, Mapping, Sequence

import numpy as np

Search = Generator[Sequence[int], Sequence[float], int]

BINS = 100  # lengths of the paper's binned search
AT_ONCE = 16  # lengths that the full search asks for in one call
# Where all tokens miss the target by no more than the factor NEAR, all but one are tried, and then
# these shares of the range, before it is given up.
NEAR, HOPES = 1.5, (0.5, 0.75)
PATIENCE = 3  # proposals that may leave more than half of what was open before it is halved
CLOSE = 0.02  # `hybrid` looks no further where it could save no more than this share of tokens
LIKELY = 0.2  # or than this share, where it expects to save none
BELOW = 0.02  # while all meet, it tries this share less than it expects to need, doubled each time


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a search is to solve.

    Attributes:
      low, high: the shortest and longest length that may be chosen.
      target: the highest error that meets it.
      guess: float64 [high - low + 1], the log of the error to be expected at each length.
    """

    low: int
    high: int
    target: float
    guess: np.ndarray


def full(problem: Problem) -> Search:
    """The shortest length that meets the target; where none does, the one of least error."""
    tried: dict[int, float] = {}
    for start in range(problem.low, problem.high + 1, AT_ONCE):
        lengths = range(start, min(start + AT_ONCE, problem.high + 1))
        tried |= zip(lengths, (yield lengths), strict=True)
        if min(tried.values()) <= problem.target:
            break
    return best(tried, problem.target)


def binned(problem: Problem) -> Search:
    """The shortest of about BINS lengths, evenly spaced in their logarithm."""
    lengths = log_spaced(problem.low, problem.high, count=BINS)
    tried = dict(zip(lengths, (yield lengths), strict=True))
    return best(tried, problem.target)


def binary(problem: Problem) -> Search:
    """A length that meets the target, in about log2(high - low) measurements one after another."""

    def propose(gap: range, tried: Mapping[int, float]) -> int:
        return gap[len(gap) // 2] if tried else problem.high

    return (yield from _narrow(problem, propose, close=0.0))


def regression(problem: Problem) -> Search:
    """The first length at which the guess meets the target, whatever its error turns out to be."""
    length = _first_below(problem, problem.guess, problem.low, problem.high)
    yield [length]
    return length


def verified_regression(problem: Problem) -> Search:
    """As `regression`, but where that misses, the guess is corrected and followed until one
    meets."""

    def propose(gap: range, tried: Mapping[int, float]) -> int:
        expected = corrected(problem.guess, tried, low=problem.low)
        return _first_below(problem, expected, gap[0], gap[-1])

    return (yield from _narrow(problem, propose, close=1.0))


def hybrid(problem: Problem) -> Search:
    """Follows the guess, corrected by what was measured, until one length has missed and one has
    met, then the straight line between these in the logarithms of length and error.

    Where more tokens never raise the error, it ends within CLOSE of the shortest, or within LIKELY
    where that line promises no saving; where they do, a shorter length may be overlooked.
    """

    def propose(gap: range, tried: Mapping[int, float]) -> int | None:
        missed, met = gap[0] - 1, gap[-1] + 1
        if missed in tried and met in tried:
            log_n, log_error = np.log([met, missed]), _log([tried[met], tried[missed]])
            line = np.exp(np.interp(np.log(problem.target), log_error, log_n))
            if line >= met - 1 and len(gap) <= LIKELY * met:
                return None
            return math.ceil(line)
        expected = corrected(problem.guess, tried, low=problem.low)
        length = _first_below(problem, expected, gap[0], met)
        if met in tried:
            hits = sum(error <= problem.target for error in tried.values())
            share = BELOW * 2 ** (hits - 1)
            length = int(length * (1 - share)) if length < met else met - max(1, int(share * met))
        return length

    return (yield from _narrow(problem, propose, close=CLOSE))


SEARCHES: dict[str, Callable[[Problem], Search]] = {
    "hybrid": hybrid,
    "full": full,
    "binned": binned,
    "binary": binary,
    "regression": regression,
    "verified_regression": verified_regression,
}


def _narrow(
    problem: Problem, propose: Callable[[range, Mapping[int, float]], int | None], *, close: float
) -> Search:
    """Measures what `propose` picks between the longest that missed and the shortest that met,
    until no more than the share `close` of that one could be saved, or it picks none.

    Along a flat curve proposals creep, a length at a time: then the middle is taken, or all tokens
    while nothing has met. So there are at most about PATIENCE log2(high - low) measurements.
    """
    tried: dict[int, float] = {}
    open_: list[int] = []  # how many lengths there were to choose from, each time
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
        else:  # all tokens miss
            left = [n for n in hopes if n >= problem.low and n not in tried]
            if not left or min(tried.values()) > NEAR * problem.target:
                break
            length = left[0]
        tried[length] = (yield [length])[0]
    return best(tried, problem.target)


def _first_below(problem: Problem, expected: np.ndarray, first: int, last: int) -> int:
    """The shortest length from `first` to `last` that is expected to meet the target, or `last`."""
    span = expected[first - problem.low : last - problem.low + 1]
    below = np.flatnonzero(span <= np.log(problem.target))
    return first + int(below[0]) if below.size else last


def log_spaced(low: int, high: int, *, count: int) -> list[int]:
    """At most `count` lengths from `low` to `high`, evenly spaced in their logarithm."""
    steps = np.linspace(np.log(low), np.log(high), count)
    return np.unique(np.round(np.exp(steps)).astype(int)).tolist()


def best(tried: Mapping[int, float], target: float) -> int:
    """Of the lengths measured, the shortest that meets the target, or that of least error."""
    met = [length for length, error in tried.items() if error <= target]
    return min(met) if met else min(tried, key=lambda length: (tried[length], length))


def corrected(guess: np.ndarray, tried: Mapping[int, float], *, low: int) -> np.ndarray:
    """`guess` moved so that it goes through what was measured; between two points the shift is
    linear in the logarithm of the length."""
    if not tried:
        return guess.copy()
    lengths = sorted(tried)
    shifts = _log([tried[n] for n in lengths]) - guess[np.asarray(lengths) - low]
    at = np.log(np.arange(low, low + len(guess)))
    return guess + np.interp(at, np.log(lengths), shifts)


def _log(errors: Sequence[float]) -> np.ndarray:
    return np.log(np.maximum(errors, 1e-12))  # one of zero has no logarithm
