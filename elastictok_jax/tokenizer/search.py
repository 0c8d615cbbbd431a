"""How many tokens a block needs for a target (paper, section 3.4): searches over a measured error.

The error is not quite monotone in the number of tokens, so a search returns only what it measured.
"""

import dataclasses
from collections.abc import Callable

Measure = Callable[[int], float]


@dataclasses.dataclass(frozen=True)
class Choice:
    """A length, its measured error, and whether that meets the target."""

    length: int
    mse: float
    met: bool


def full_search(measure: Measure, *, low: int, high: int, target: float) -> Choice:
    """The shortest length in [low, high] that meets `target`; `high`, not met, where none does."""
    for length in range(low, high + 1):
        mse = measure(length)
        if mse <= target:
            return Choice(length, mse, True)
    return Choice(high, mse, False)


def binary_search(measure: Measure, *, low: int, high: int, target: float) -> Choice:
    """A length in [low, high] that meets `target`, in about log2(high - low) measurements.

    Where all `high` tokens miss the target fewer may still reach it, so every length is tried
    before the target is given up; a length shorter than the one returned may meet it too.
    """
    mse = measure(high)
    if mse > target:
        return full_search(measure, low=low, high=high, target=target)
    choice = Choice(high, mse, True)
    while low < choice.length:
        middle = (low + choice.length) // 2
        mse = measure(middle)
        if mse <= target:
            choice = Choice(middle, mse, True)
        else:
            low = middle + 1
    return choice


SEARCHES = {"binary": binary_search, "full": full_search}
