"""The goal of an encoding: a number of tokens, a quality to reach, or a budget to spend."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from elastictok_jax.errors import UsageError
from elastictok_jax.pixels import PEAK
from elastictok_jax.tokenizer.search import SEARCHES

MAX_PSNR = 200  # dB; far beyond what 8-bit pixels can show
GOALS = ("tokens", "max_mse", "min_psnr", "max_lpips", "budget", "total_tokens")


@dataclasses.dataclass(frozen=True)
class Goal:
    """Exactly one of `tokens` ... `total_tokens`, and the search that the thresholds use.

    Attributes:
      tokens: tokens per block, one number for all blocks or one each.
      max_mse: highest error of a block, on the [-1, 1] scale; min_psnr: the same in dB;
        max_lpips: highest mean LPIPS of a block's frames.
      budget: mean fraction of full length that blocks may use; total_tokens: tokens of all clips.
      search: a key of `SEARCHES`.

    Raises:
      UsageError: naming the offending value.
    """

    tokens: int | Sequence[int] | None = None
    max_mse: float | None = None
    min_psnr: float | None = None
    max_lpips: float | None = None
    budget: float | None = None
    total_tokens: int | None = None
    search: str = "hybrid"

    def __post_init__(self) -> None:
        given = [name for name in GOALS if getattr(self, name) is not None]
        if len(given) != 1:
            raise UsageError(
                f"encoding needs exactly one of {', '.join(GOALS)}; given: "
                f"{', '.join(given) or 'none'}"
            )
        if self.search not in SEARCHES:
            raise UsageError(f"search {self.search!r}: choose one of {', '.join(SEARCHES)}")
        for name in ("max_mse", "max_lpips", "min_psnr"):
            value = getattr(self, name)
            if value is not None and not (0 < value < math.inf):
                raise UsageError(f"{name}={value}: give a number above 0")
        if self.min_psnr is not None and self.min_psnr > MAX_PSNR:
            raise UsageError(f"min_psnr={self.min_psnr}: give decibels, up to {MAX_PSNR}")
        total = self.total_tokens
        if total is not None and not isinstance(total, int | np.integer):
            raise UsageError(f"total_tokens={total}: give a whole number")
        if self.budget is not None and not 0 < self.budget <= 1:
            raise UsageError(f"budget={self.budget}: give a fraction of all tokens in (0, 1]")

    @property
    def target(self) -> float | None:
        """The highest error in units of `metric`, or None if the goal is not a quality."""
        if self.min_psnr is not None:
            return PEAK**2 / 10 ** (self.min_psnr / 10)
        return self.max_mse if self.max_lpips is None else self.max_lpips

    @property
    def metric(self) -> str:
        """The error that is measured: "mse" or "lpips"."""
        return "mse" if self.max_lpips is None else "lpips"

    @property
    def spends(self) -> bool:
        """Whether the goal is a budget."""
        return self.budget is not None or self.total_tokens is not None

    def __str__(self) -> str:
        if self.tokens is not None:
            return f"{self.tokens} tokens a block"
        if self.max_mse is not None:
            return f"MSE {self.max_mse:g}"
        if self.min_psnr is not None:
            return f"PSNR {self.min_psnr:g} dB"
        if self.max_lpips is not None:
            return f"LPIPS {self.max_lpips:g}"
        if self.budget is not None:
            return f"{self.budget:g} of all tokens"
        return f"{self.total_tokens} tokens in all"

    def total(self, blocks: int, *, low: int, high: int) -> int:
        """Returns the total tokens that a budget grants to blocks of `low` to `high` tokens each.

        Raises:
          UsageError: if no lengths in this range have that total.
        """
        total = self.total_tokens
        if total is None:
            assert self.budget is not None
            total = round(self.budget * blocks * high)
        if not blocks * low <= total <= blocks * high:
            raise UsageError(
                f"{total} tokens for {blocks} blocks of {low} to {high} tokens: give a budget from "
                f"{low / high:.3g} to 1, or total_tokens from {blocks * low} to {blocks * high}"
            )
        return total

    def lengths(self, blocks: int, *, tokens_per_block: int) -> np.ndarray:
        """Returns the lengths requested by `tokens`, int32 [blocks].

        Raises:
          UsageError: if their number differs from `blocks`, or one is out of range.
        """
        try:
            lengths = np.broadcast_to(np.asarray(self.tokens), blocks)
        except ValueError:
            raise UsageError(
                f"tokens= has {np.size(np.asarray(self.tokens))} lengths for {blocks} blocks"
            ) from None
        is_integer = lengths.dtype.kind in "iu"
        if not is_integer or lengths.min() < 1 or lengths.max() > tokens_per_block:
            raise UsageError(
                f"tokens={self.tokens}: give whole numbers from 1 to {tokens_per_block}, "
                "the tokens of a block"
            )
        return lengths.astype(np.int32)
