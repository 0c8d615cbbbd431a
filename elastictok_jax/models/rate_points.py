"""Evaluates elastic tokenizers at several rates: fractions of a block's tokens.

Dimension key: K fractions, N blocks.
"""

from collections.abc import Sequence

import ml_collections
import numpy as np

FRACTIONS = (1.0, 0.5, 0.25, 0.125, 0.0625)  # of a block's tokens


def evaluated_fractions(config: ml_collections.ConfigDict) -> tuple[float, ...]:
    """Returns the fractions of a block's tokens to evaluate: FRACTIONS, or the one trained for."""
    return (config.masking.fraction,) if config.masking.kind == "fixed" else FRACTIONS


def rate_point_metric_directions(
    fractions: Sequence[float], targets: Sequence[float]
) -> dict[str, str]:
    """Returns "lower" or "higher" for each metric: which value is better."""
    better = {rate_point_mse_name(fraction, fractions): "lower" for fraction in fractions}
    for target in targets:
        better[f"met_at_mse_{target:g}"] = "higher"
        better[f"tokens_at_mse_{target:g}"] = "lower"
    return better


def rate_point_mse_name(fraction: float, fractions: Sequence[float]) -> str:
    """Returns the name of the MSE at one of `fractions`; the first has no suffix."""
    return "mse" if fraction == fractions[0] else f"mse_at_{fraction:g}"


def tokens_at_targets(
    errors_KN: np.ndarray, tokens_K: np.ndarray, targets: Sequence[float]
) -> dict[str, float]:
    """Returns how few tokens meet each target.

    For each target: the fraction of blocks that meet it with one of the K numbers of tokens, and
    the mean of the fewest that do, or of the most where none does.

    Args:
      errors_KN: MSE of each block, nan for padding.
    """
    errors_KN = errors_KN[:, ~np.isnan(errors_KN[0])]
    results = {}
    for target in targets:
        met_KN = errors_KN <= target
        fewest_N = np.where(met_KN, tokens_K[:, None], tokens_K.max()).min(axis=0)
        results[f"met_at_mse_{target:g}"] = float(met_KN.any(axis=0).mean())
        results[f"tokens_at_mse_{target:g}"] = float(fewest_N.mean())
    return results
