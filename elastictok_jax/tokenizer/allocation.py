"""Allocates a token budget to minimise distortion: over blocks, over clips or along a stream.

Dimension key: N blocks, M lengths a block can have (low, low + 1, ..., high), C blocks that may
still change. An *offset* is a length less `low`, a column of the curves. Pure numpy, float64.

Lagrangian relaxation [Everett 1963; Shoham and Gersho 1988] puts a price on a token: at a given
price each block chooses its best length independently, which bounds the optimum from below. The
remaining gap is closed by a dynamic programme over the few lengths whose reduced cost is within it.
"""

import dataclasses
import math
from collections import deque
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from elastictok_jax.errors import UsageError

EXCHANGES = 30  # rounds of local search before the dynamic programme
# Limits of the dynamic programme: additions (about 3 s on one core) and float64 values kept for
# backtracking (512 MiB).
MAX_ADDITIONS = 10**10
MAX_KEPT = 2**26


@dataclasses.dataclass(frozen=True)
class Allocation:
    """Lengths with an exact total, and a bound on their distortion.

    Attributes:
      lengths: int32 [N], tokens of each block.
      distortion: sum over blocks of the distortion at these lengths.
      lower_bound: the least that this sum can be at this total (to float64 rounding).
    """

    lengths: np.ndarray
    distortion: float
    lower_bound: float

    @property
    def is_optimal(self) -> bool:
        """Whether the lengths are proved optimal, to float64 rounding."""
        return self.lower_bound >= self.distortion


def allocate(curves: np.ndarray, *, total: int, low: int, high: int) -> Allocation:
    """Returns the lengths that sum to `total` with the least summed distortion.

    The result is exact for any curves, to float64 rounding: about 2e-15 of the sum over blocks of
    the largest magnitude. Only if the dynamic programme would exceed MAX_ADDITIONS or MAX_KEPT is
    it a local optimum, with `lower_bound` below `distortion`. This has been seen with hundreds of
    blocks that share one staircase or one very noisy curve, or whose curves are concave.

    Args:
      curves: [N, M] distortion of each block at every length from low to high; any finite values,
        monotone or not, convex or not. To weight clips, scale their rows.
      total: the sum of all lengths.

    Raises:
      UsageError: if no lengths sum to `total`, or the curves have another shape or are not finite.
    """
    costs_NM = _checked(curves, low=low, high=high)
    blocks = len(costs_NM)
    if not blocks * low <= total <= blocks * high:
        raise UsageError(
            f"{total} tokens for {blocks} blocks of {low} to {high} each: "
            f"give a total in [{blocks * low}, {blocks * high}]"
        )
    if blocks == 0:
        return Allocation(np.zeros(0, np.int32), 0.0, 0.0)
    # A power of two scales without rounding, so that no sum overflows.
    exponent = math.frexp(float(np.abs(costs_NM).max()))[1]
    costs_NM = np.ldexp(costs_NM, -exponent)
    spend = total - blocks * low
    more_N, fewer_N, price = _price(costs_NM, spend=spend)
    reduced_NM = _priced(costs_NM, price)
    reduced_NM -= reduced_NM.min(axis=1, keepdims=True)
    tolerance = _rounding(costs_NM)
    offsets_N = _fill(fewer_N, more_N, spend=spend)
    offsets_N = _exchange(reduced_NM, offsets_N, tolerance=tolerance)
    rows = np.arange(blocks)
    gap = float(reduced_NM[rows, offsets_N].sum())
    proved = gap <= tolerance
    if not proved:
        closed_N = _close_gap(reduced_NM, spend=spend, gap=gap + tolerance)
        proved = closed_N is not None
        if closed_N is not None and reduced_NM[rows, closed_N].sum() < gap:
            offsets_N = closed_N
    scaled = math.fsum(costs_NM[rows, offsets_N])
    bound = scaled if proved else scaled - gap
    return Allocation(
        lengths=(offsets_N + low).astype(np.int32),
        distortion=float(np.ldexp(scaled, exponent)),
        lower_bound=float(np.ldexp(bound, exponent)),
    )


def interpolate_curves(
    measured: Sequence[tuple[Sequence[int] | np.ndarray, Sequence[float] | np.ndarray]],
    *,
    low: int,
    high: int,
) -> np.ndarray:
    """Interpolates the error at every length from a few measured lengths.

    The curve passes through the measurements, is linear in log(length) and log(error) between
    neighbours and constant beyond the ends. Next to a point of error 0, which has no log, it is
    linear in log(length) and error.

    Args:
      measured: (lengths, errors) for each of N blocks: at least one point, in any order.

    Returns:
      float64 [N, M], errors at low, ..., high.

    Raises:
      UsageError: if a block has no points, a length that repeats or is below 1, or an error that
        is negative or not finite.
    """
    grid_M = np.log(_length_range(low=low, high=high))
    curves_NM = np.zeros((len(measured), len(grid_M)))
    for block, (lengths, errors) in enumerate(measured):
        curves_NM[block] = _interpolate(
            block, np.asarray(lengths), np.asarray(errors, np.float64), grid_M, low
        )
    return curves_NM


@dataclasses.dataclass
class BudgetPlanner:
    """Chooses the lengths of a stream's blocks causally, one block after another.

    Each block gets its best length at the current price of a token: the price at which the last
    `window` blocks, including this one, would have used the target, corrected by the surplus or
    deficit so far. Tokens thus go to the blocks that gain most from them, as in `allocate`, and
    memory holds `window` curves.

    After any n blocks at most tokens_per_block * n + reserve tokens are used. On a stationary
    stream the mean use converges to tokens_per_block, unless fewer tokens are better: the price is
    never negative, and unused tokens stay available. If `blocks` is given, exactly
    floor(tokens_per_block * blocks) tokens are used in the end.

    Attributes:
      tokens_per_block: target mean, in [low, high]; a float is converted to the nearest fraction
        with a denominator up to 1e6. For a total over known blocks, use Fraction(total, blocks).
      low, high: shortest and longest length.
      reserve: tokens that may be used ahead of the target, at least 0; with 0 a block exceeds the
        target only by what earlier blocks saved.
      window: blocks that the price is estimated from; it should span several scenes, or tokens do
        not move between them.
      blocks: blocks in the stream, or None if unknown.

    Raises:
      UsageError: if an attribute is out of range.
    """

    tokens_per_block: float | Fraction
    low: int
    high: int
    reserve: int
    window: int = 256
    blocks: int | None = None
    used: int = dataclasses.field(default=0, init=False)
    done: int = dataclasses.field(default=0, init=False)

    def __post_init__(self) -> None:
        _length_range(low=self.low, high=self.high)
        if not self.low <= self.tokens_per_block <= self.high:
            raise UsageError(
                f"a budget of {float(self.tokens_per_block):g} tokens a block: "
                f"give one in [{self.low}, {self.high}]"
            )
        if self.reserve < 0 or self.window < 1 or (self.blocks is not None and self.blocks < 1):
            raise UsageError(
                f"reserve {self.reserve}, window {self.window}, blocks {self.blocks}: "
                "give a reserve of at least 0 tokens, and a window and blocks of at least 1"
            )
        self._target = Fraction(self.tokens_per_block)
        if isinstance(self.tokens_per_block, float):
            self._target = self._target.limit_denominator(10**6)
        self._past: deque[np.ndarray] = deque(maxlen=self.window)

    def next_length(self, curve: np.ndarray) -> int:
        """Returns the length of the next block, whose distortion at low, ..., high is `curve` [M].

        Raises:
          UsageError: if the curve has another shape or is not finite, or all blocks are done.
        """
        if self.done == self.blocks:
            raise UsageError(f"all {self.blocks} blocks have their lengths: start a new budget")
        self._past.append(_checked(np.asarray(curve)[None], low=self.low, high=self.high)[0])
        shortest, longest = self._allowed()
        aim = self._aim()
        curves_NM = np.stack(self._past)
        most = (self.high - self.low) * len(curves_NM)
        spend = min(max(round((aim - self.low) * len(curves_NM)), 0), most)
        price = max(_price(curves_NM, spend=spend)[2], 0.0)
        allowed = np.arange(shortest, longest + 1)
        priced = curves_NM[-1, allowed - self.low] + price * (allowed - self.low)
        # Of equally good lengths, take the one nearest the aim: on a straight curve all are equally
        # good, and the choice would otherwise alternate between low and high.
        ties = allowed[priced <= priced.min() + _rounding(curves_NM[-1:])]
        length = int(ties[np.argmin(np.abs(ties - float(aim)))])
        self.used += length
        self.done += 1
        return length

    def _allowed(self) -> tuple[int, int]:
        """Returns the shortest and longest length that respect the reserve and the total."""
        most = math.floor(self._target * (self.done + 1)) + self.reserve - self.used
        shortest, longest = self.low, min(self.high, most)
        if self.blocks is not None:
            remaining = math.floor(self._target * self.blocks) - self.used
            later = self.blocks - self.done - 1
            shortest = max(shortest, remaining - self.high * later)
            longest = min(longest, remaining - self.low * later)
        return shortest, longest

    def _aim(self) -> Fraction:
        """Returns the mean length from here on that brings the use back to the target."""
        horizon = self.window if self.blocks is None else self.blocks - self.done
        return self._target + (self._target * self.done - self.used) / horizon


def _length_range(*, low: int, high: int) -> np.ndarray:
    if not 1 <= low <= high:
        raise UsageError(f"lengths from {low} to {high}: give 1 <= low <= high")
    return np.arange(low, high + 1)


def _checked(curves: np.ndarray, *, low: int, high: int) -> np.ndarray:
    lengths = len(_length_range(low=low, high=high))
    curves = np.asarray(curves, np.float64)
    if curves.ndim != 2 or curves.shape[1] != lengths:
        raise UsageError(
            f"curves of shape {curves.shape} for lengths {low} to {high}: "
            f"give one row of {lengths} per block"
        )
    if not np.isfinite(curves).all():
        block = int(np.argmin(np.isfinite(curves).all(axis=1)))
        raise UsageError(f"the curve of block {block} is not finite: give finite distortions")
    return curves


def _interpolate(
    block: int, lengths: np.ndarray, errors: np.ndarray, grid_M: np.ndarray, low: int
) -> np.ndarray:
    if not len(lengths) == len(errors) == len(set(lengths.tolist())) > 0 or lengths.min() < 1:
        raise UsageError(
            f"block {block} has errors at lengths {lengths.tolist()}: "
            "give one error for each of one or more distinct lengths >= 1"
        )
    if not (np.isfinite(errors) & (errors >= 0)).all():
        raise UsageError(f"block {block} has errors {errors.tolist()}: give finite values >= 0")
    order = np.argsort(lengths)
    lengths, errors = lengths[order], errors[order]
    at = np.log(lengths)
    is_zero = errors == 0
    logs = np.log(np.where(is_zero, 1.0, errors))
    curve_M = np.exp(np.interp(grid_M, at, logs))
    right = np.clip(np.searchsorted(at, grid_M), 0, len(at) - 1)
    left = np.maximum(right - 1, 0)
    # Also where both ends have the same error, which exp(log(error)) would round.
    level = (errors[left] == errors[right]) | (grid_M < at[0]) | (grid_M > at[-1])
    is_straight = is_zero[left] | is_zero[right] | level
    curve_M[is_straight] = np.interp(grid_M[is_straight], at, errors)
    within = (lengths >= low) & (lengths < low + len(grid_M))
    curve_M[lengths[within] - low] = errors[within]
    return curve_M


def _rounding(costs_NM: np.ndarray) -> float:
    """Returns a bound on the rounding error of a sum of one cost per block."""
    return 8 * np.finfo(np.float64).eps * float(np.abs(costs_NM).max(axis=1).sum())


def _priced(costs_NM: np.ndarray, price: float) -> np.ndarray:
    """Returns costs plus the price of their tokens, up to a constant per block."""
    # Counting from the end that the price favours keeps precision near the minimum.
    origin = 0 if price >= 0 else costs_NM.shape[1] - 1
    return costs_NM + price * (np.arange(costs_NM.shape[1]) - origin)


def _price(costs_NM: np.ndarray, *, spend: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Returns the token price with the tightest lower bound on the optimum.

    The points (summed offsets, summed costs) of the best choices at each price are the corners of
    a convex chain. Starting from its two ends, the slope of the chord over `spend` gives the corner
    farthest below the chord, until there is none: the chord is then an edge of the chain.

    Returns:
      (more_N, fewer_N, price): offsets [N], both optimal at the price, that use at least and at
      most `spend`.
    """
    blocks, lengths = costs_NM.shape
    rows = np.arange(blocks)
    more_N, fewer_N = np.full(blocks, lengths - 1), np.zeros(blocks, np.int64)
    cost_more, cost_fewer = (costs_NM[rows, ends].sum() for ends in (more_N, fewer_N))
    price = 0.0
    tolerance = _rounding(costs_NM)
    while more_N.sum() > fewer_N.sum():
        price = float((cost_fewer - cost_more) / (more_N.sum() - fewer_N.sum()))
        best_N = np.argmin(_priced(costs_NM, price), axis=1)
        cost, used = costs_NM[rows, best_N].sum(), best_N.sum()
        if used == spend:
            return best_N, best_N, price
        below = cost_fewer - cost + price * (fewer_N.sum() - used)
        if below <= tolerance or not fewer_N.sum() < used < more_N.sum():
            break
        if used > spend:
            more_N, cost_more = best_N, cost
        else:
            fewer_N, cost_fewer = best_N, cost
    return more_N, fewer_N, price


def _fill(fewer_N: np.ndarray, more_N: np.ndarray, *, spend: int) -> np.ndarray:
    """Moves `fewer` towards `more`, block by block, until exactly `spend` is used."""
    steps_N = np.maximum(more_N - fewer_N, 0)
    before_N = np.cumsum(steps_N) - steps_N
    return fewer_N + np.clip(spend - fewer_N.sum() - before_N, 0, steps_N)


def _exchange(reduced_NM: np.ndarray, offsets_N: np.ndarray, *, tolerance: float) -> np.ndarray:
    """Moves tokens between the best pair of blocks in each round while that lowers the cost."""
    blocks, lengths = reduced_NM.shape
    offsets_N = offsets_N.copy()
    for _ in range(EXCHANGES if blocks > 1 else 0):
        (cost, next_cost), (block, next_block) = _cheapest_changes(reduced_NM, offsets_N)
        # A second block makes the opposite change: the cheapest one, or the runner-up if that is
        # the same block.
        is_same = block == block[::-1]
        summed = cost + np.where(is_same, next_cost[::-1], cost[::-1])
        best = int(np.argmin(summed))
        if not summed[best] < -tolerance:
            break
        change = best - (lengths - 1)
        offsets_N[block[best]] += change
        offsets_N[(next_block if is_same[best] else block)[::-1][best]] -= change
    return offsets_N


def _cheapest_changes(
    reduced_NM: np.ndarray, offsets_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the two cheapest blocks for every change of an offset, from -(M - 1) to M - 1.

    Returns:
      The added costs and the block indices: float64 and int64 [2, 2 M - 1].
    """
    lengths = reduced_NM.shape[1]
    cost = np.full((2, 2 * lengths - 1), np.inf)
    block = np.zeros((2, 2 * lengths - 1), np.int64)
    for row, offset in enumerate(offsets_N):
        span = slice(lengths - 1 - offset, 2 * lengths - 1 - offset)
        added_M = reduced_NM[row] - reduced_NM[row, offset]
        is_first, is_next = added_M < cost[0, span], added_M < cost[1, span]
        cost[1, span] = np.where(is_first, cost[0, span], np.where(is_next, added_M, cost[1, span]))
        block[1, span] = np.where(is_first, block[0, span], np.where(is_next, row, block[1, span]))
        cost[0, span] = np.where(is_first, added_M, cost[0, span])
        block[0, span] = np.where(is_first, row, block[0, span])
    return cost, block


def _close_gap(reduced_NM: np.ndarray, *, spend: int, gap: float) -> np.ndarray | None:
    """Returns offsets [N] that use `spend` with the least summed reduced cost, at most `gap`.

    Lengths and partial sums whose reduced cost exceeds the gap are pruned, since no better
    allocation contains them. Returns None if the remainder exceeds MAX_ADDITIONS or MAX_KEPT.
    """
    kept_NM = reduced_NM <= gap
    first_N = kept_NM.argmax(axis=1)
    span_N = kept_NM.shape[1] - 1 - kept_NM[:, ::-1].argmax(axis=1) - first_N
    changing_C = np.flatnonzero(span_N)
    # Blocks with many lengths come first, while there are few sums.
    changing_C = changing_C[np.argsort(-span_N[changing_C], kind="stable")]
    target = spend - int(first_N.sum())
    later_C = np.cumsum(span_N[changing_C][::-1])[::-1] - span_N[changing_C]
    # stages[c]: (start, least costs of the sums start, start + 1, ... of the first c offsets).
    stages: list[tuple[int, np.ndarray]] = [(0, np.zeros(1))]
    rows: list[np.ndarray] = []
    additions = kept = 0
    for block, later in zip(changing_C, later_C, strict=True):
        row = reduced_NM[block, first_N[block] : first_N[block] + span_N[block] + 1]
        rows.append(np.where(row <= gap, row, np.inf))
        start, costs = stages[-1]
        additions += min(np.isfinite(rows[-1]).sum(), np.isfinite(costs).sum()) * max(
            len(rows[-1]), len(costs)
        )
        kept += len(costs)
        if additions > MAX_ADDITIONS or kept > MAX_KEPT:
            return None
        # Drop sums from which the remaining blocks cannot reach the target.
        skip = max(0, int(target - later) - start)
        sums = _min_plus(costs, rows[-1])[skip : max(target - start + 1, 0)]
        sums = np.where(sums <= gap, sums, np.inf)
        reachable = np.flatnonzero(np.isfinite(sums))
        stages.append((start + skip + reachable[0], sums[reachable[0] : reachable[-1] + 1]))
    offsets_N, left = first_N.copy(), target
    for block, row, (start, costs) in zip(
        changing_C[::-1], rows[::-1], stages[-2::-1], strict=True
    ):
        steps = np.arange(max(0, left - start - len(costs) + 1), min(len(row), left - start + 1))
        step = int(steps[np.argmin(row[steps] + costs[left - start - steps])])
        offsets_N[block] += step
        left -= step
    return offsets_N


def _min_plus(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Returns the min-plus convolution, min over i + j = k of one[i] + two[j], skipping infs."""
    few, many = sorted((one, two), key=lambda costs: int(np.isfinite(costs).sum()))
    sums = np.full(len(one) + len(two) - 1, np.inf)
    for index in np.flatnonzero(np.isfinite(few)):
        into = sums[index : index + len(many)]
        np.minimum(into, many + few[index], out=into)
    return sums
