"""Says which fraction of blocks meets a target with how many tokens.

Dimension key: N blocks.
"""

import numpy as np


def fraction_met_curve(
    lengths_N: np.ndarray, met_N: np.ndarray, *, least: int
) -> tuple[np.ndarray, np.ndarray]:
    """Computes the largest fraction of blocks that can meet a target, by mean tokens per block.

    Tokens go first to the blocks that need fewest; those given up take `least` (paper, Fig. 4).

    Args:
      lengths_N: the fewest tokens with which each block meets the target, where `met_N`.

    Returns:
      Mean tokens per block and fraction of blocks met, float64 [1 + blocks that can meet it] each.
    """
    needed = np.sort(lengths_N[met_N].astype(np.float64))
    spent = np.concatenate([[0.0], np.cumsum(needed)])
    count = np.arange(len(spent))
    tokens = (spent + (len(lengths_N) - count) * least) / len(lengths_N)
    return tokens, count / len(lengths_N)


def tokens_for_fraction_met(
    lengths_N: np.ndarray, met_N: np.ndarray, *, least: int, fraction: float
) -> float | None:
    """Returns the mean tokens per block at which `fraction` of the blocks meets a target.

    Returns None if no number of tokens suffices.
    """
    tokens, shares = fraction_met_curve(lengths_N, met_N, least=least)
    enough = np.flatnonzero(shares >= fraction - 1e-9)
    return float(tokens[enough[0]]) if enough.size else None


def fraction_met_for_tokens(
    lengths_N: np.ndarray, met_N: np.ndarray, *, least: int, tokens: float
) -> float:
    """Returns the fraction of blocks that can meet a target with a mean of `tokens` per block."""
    spent, shares = fraction_met_curve(lengths_N, met_N, least=least)
    return float(shares[spent <= max(tokens, least) + 1e-9].max())
