"""Policies that choose each block's token count."""

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import numpy as np

from elastictok_jax.tokenizer.allocation import BudgetPlanner, interpolate_curves
from elastictok_jax.tokenizer.block_codec import BlockEncoder, CodedBlock
from elastictok_jax.tokenizer.search import (
    SEARCHES,
    SearchProblem,
    correct_search_guess,
    log_spaced,
)

# Slope of log error over log length, if nothing better is known.
TYPICAL_SLOPE = -0.35

# If an error from several lengths at once is within this fraction of the target, rounding could
# decide, so the length is measured again on its own.
DOUBT = 1e-4
POINTS = 12  # lengths at which a curve is measured to spend a budget
RESERVE_BLOCKS = 16  # tokens that a stream may overdraw, in blocks of mean length

# Returns log error at every length, as `Router` does.
Predict = Callable[[BlockEncoder], np.ndarray]


class LengthPolicy(Protocol):
    """Chooses a length for each block of one clip, given one after another."""

    def keep(self, block: BlockEncoder) -> CodedBlock: ...


class FixedLength:
    """Uses given lengths, one per block."""

    def __init__(self, lengths: Iterable[int]) -> None:
        self._lengths: Iterator[int] = iter(lengths)

    def keep(self, block: BlockEncoder) -> CodedBlock:
        return block.keep(next(self._lengths))


class TargetError:
    """Uses the fewest tokens that a search of `SEARCHES` finds for a highest error.

    The search starts from the curve that `router` predicts for the block or, without a router, from
    measurements on the previous blocks, which usually look alike.
    """

    def __init__(
        self, target: float, *, search: str, low: int, high: int, router: Predict | None = None
    ) -> None:
        self._target, self._low, self._high = target, low, high
        self._search, self._router = SEARCHES[search].search, router
        logs = np.log(np.arange(low, high + 1))
        middle = (logs[0] + logs[-1]) / 2
        self._guess = np.log(target) + TYPICAL_SLOPE * (logs - middle)

    def keep(self, block: BlockEncoder) -> CodedBlock:
        guess = self._guess if self._router is None else self._router(block)
        problem = SearchProblem(self._low, self._high, self._target, guess)
        exact: set[int] = set()  # measured by the program that `ClipDecoder` runs
        measured: dict[int, float] = {}
        while True:
            length = self._run(problem, block, measured, exact)
            if length in exact:
                break
            measured[length] = block.measure(length, target=self._target).error
            exact.add(length)
        self._guess = correct_search_guess(guess, measured, low=self._low)
        return block.keep(length, target=self._target)

    def _run(
        self,
        problem: SearchProblem,
        block: BlockEncoder,
        measured: dict[int, float],
        exact: set[int],
    ) -> int:
        """Returns the result of the search, which does not repeat what is in `measured`."""
        search = self._search(problem)
        try:
            lengths = next(search)
            while True:
                new = [length for length in lengths if length not in measured]
                if len(new) == 1:
                    measured[new[0]] = block.measure(new[0], target=self._target).error
                    exact.add(new[0])
                elif new:
                    measured |= zip(new, block.errors(new), strict=True)
                    for length in new:
                        if abs(measured[length] / self._target - 1) < DOUBT:
                            measured[length] = block.measure(length, target=self._target).error
                            exact.add(length)
                lengths = search.send([measured[length] for length in lengths])
        except StopIteration as stop:
            return stop.value


def _measured_curve(block: BlockEncoder, *, low: int, high: int) -> np.ndarray:
    """Returns float64 [high - low + 1], squared error by length, interpolated from POINTS."""
    lengths = log_spaced(low, high, count=POINTS)
    points = [(lengths, np.asarray(block.errors(lengths)))]
    return interpolate_curves(points, low=low, high=high)[0] * block.fraction_inside


class Probe:
    """Uses given lengths, one per block, and measures the error at others.

    Attributes:
      curves: float64 [high - low + 1] of each block so far.
      errors: squared error of each block so far at its length.
    """

    def __init__(self, lengths: Iterable[int], *, low: int, high: int) -> None:
        self._lengths, self._bounds = iter(lengths), dict(low=low, high=high)
        self.curves: list[np.ndarray] = []
        self.errors: list[float] = []

    def keep(self, block: BlockEncoder) -> CodedBlock:
        self.curves.append(_measured_curve(block, **self._bounds))
        kept = block.keep(int(next(self._lengths)))
        self.errors.append(kept.mse * block.fraction_inside)
        return kept


class CausalBudget:
    """Keeps to a mean number of tokens per block without knowledge of later blocks."""

    def __init__(self, tokens: float, *, low: int, high: int) -> None:
        self._bounds = dict(low=low, high=high)
        self._account = BudgetPlanner(tokens, low, high, reserve=round(RESERVE_BLOCKS * tokens))

    def keep(self, block: BlockEncoder) -> CodedBlock:
        return block.keep(self._account.next_length(_measured_curve(block, **self._bounds)))
