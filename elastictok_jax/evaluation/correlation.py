"""Correlates two arrays, by values or by ranks."""

import numpy as np


def pearson_correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    """Returns Pearson's r, or None if either array is constant."""
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def spearman_correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    """Returns Spearman's rho, Pearson's r of the ranks; None if either array is constant."""
    return pearson_correlation(_ranks(x), _ranks(y))


def _ranks(x: np.ndarray) -> np.ndarray:
    """Returns the rank of each value; ties share their mean rank."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]
