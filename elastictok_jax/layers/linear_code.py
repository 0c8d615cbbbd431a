"""A linear transform code of blocks of patches: the reference that a tokenizer has to beat.

Patches are projected on their principal components, and the components of a block pass an
orthonormal DCT over the grid of its patches, as pictures do in JPEG. Coefficients are quantised to
digits that are dealt to tokens by what is still to gain: the next digit goes to the coefficient
with the largest remaining variance, so that a large coefficient gets a second and a third digit,
each of which refines what those before it leave (an embedded code, as EZW: Shapiro 1993). A prefix
of a block's tokens is then the best code of that length, and nothing is learned but variances.

Dimension key: N blocks, L patches of a block in raster order (t, h, w), D values of a patch, K
components of a patch, C = L x K coefficients of a block, T tokens, Z digits of a token.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np

SPREADS = np.linspace(0.6, 5.0, 12)  # full scales of a digit that are tried, in deviations


@dataclasses.dataclass(frozen=True)
class PatchSpectrum:
    """The transform: principal components of patches, then a DCT over their grid.

    Attributes:
      grid: patches of a block in time, height and width.
      mean_D: mean patch, float64.
      components_DK: orthonormal, float64.
    """

    grid: tuple[int, int, int]
    mean_D: np.ndarray
    components_DK: np.ndarray

    @classmethod
    def fit(
        cls, patches_NLD: np.ndarray, *, grid: tuple[int, int, int], components: int
    ) -> "PatchSpectrum":
        """Returns the transform whose components hold most of the variance of these patches."""
        values = patches_NLD.reshape(-1, patches_NLD.shape[-1])
        mean_D = values.mean(axis=0, dtype=np.float64)
        moments_DD = values.T @ values / len(values) - np.outer(mean_D, mean_D)
        _, vectors_DD = np.linalg.eigh(moments_DD.astype(np.float64))  # ascending
        return cls(grid, mean_D, vectors_DD[:, ::-1][:, :components])

    @functools.cached_property
    def _transforms(self) -> tuple[np.ndarray, ...]:
        return tuple(dct_matrix(size) for size in self.grid)

    def coefficients(self, patches_NLD: np.ndarray) -> np.ndarray:
        """Converts patches to coefficients float64 [N, C]."""
        parts = (patches_NLD - self.mean_D) @ self.components_DK
        parts = parts.reshape(-1, *self.grid, parts.shape[-1])
        spectrum = np.einsum("nthwk,at,bh,cw->nabck", parts, *self._transforms, optimize=True)
        return spectrum.reshape(len(parts), -1)

    def patches(self, coefficients_NC: np.ndarray) -> np.ndarray:
        """Inverts `coefficients` but for what the components leave out: float64 [N, L, D]."""
        spectrum = coefficients_NC.reshape(len(coefficients_NC), *self.grid, -1)
        parts = np.einsum("nabck,at,bh,cw->nthwk", spectrum, *self._transforms, optimize=True)
        parts = parts.reshape(len(parts), math.prod(self.grid), -1)
        return parts @ self.components_DK.T + self.mean_D


def dct_matrix(size: int) -> np.ndarray:
    """Returns the orthonormal DCT-II, float64 [frequency, place]."""
    place, frequency = np.arange(size) + 0.5, np.arange(size)[:, None]
    matrix = np.cos(np.pi * frequency * place / size) * np.sqrt(2.0 / size)
    matrix[0] /= np.sqrt(2.0)
    return matrix


@dataclasses.dataclass(frozen=True)
class Digit:
    """A digit of a token, which refines a coefficient.

    Digit d of 0 ... levels - 1 stands for (d - levels // 2 + offset) x step. An even number of
    levels either has a zero and one more step on one side, which the sign of `step` chooses, or
    straddles zero (offset 0.5).
    """

    coefficient: int
    levels: int
    step: float
    offset: float = 0.0

    def quantise(self, values: np.ndarray) -> np.ndarray:
        """Returns what the nearest digits stand for."""
        half = self.levels // 2
        digits = np.clip(np.round(values / self.step - self.offset), -half, self.levels - 1 - half)
        return (digits + self.offset) * self.step


def deal_digits(coefficients_NC: np.ndarray, *, levels: Sequence[int], tokens: int) -> list[Digit]:
    """Deals the digits of `tokens` tokens, in order, to coefficients of training blocks.

    Args:
      levels: number of values of each of the Z digits of a token.

    Returns:
      T x Z digits, those of the first token first.
    """
    left_CN = np.ascontiguousarray(coefficients_NC.T, np.float64)
    variances_C = np.mean(left_CN**2, axis=1)
    digits = []
    for size in list(levels) * tokens:
        place = int(np.argmax(variances_C))
        digit = _best_digit(left_CN[place], place, size)
        left_CN[place] -= digit.quantise(left_CN[place])
        variances_C[place] = np.mean(left_CN[place] ** 2)
        digits.append(digit)
    return digits


def _best_digit(values_N: np.ndarray, place: int, levels: int) -> Digit:
    """Returns the digit of a coefficient with the smallest squared error."""
    steps = SPREADS * max(float(np.std(values_N)), 1e-12) / (levels // 2)
    tried = [Digit(place, levels, step) for step in steps]
    if levels % 2 == 0:
        tried += [Digit(place, levels, -step) for step in steps]
        tried += [Digit(place, levels, step, 0.5) for step in steps]
    errors = [np.mean((values_N - digit.quantise(values_N)) ** 2) for digit in tried]
    return tried[int(np.argmin(errors))]


def decode_prefixes(
    coefficients_NC: np.ndarray,
    digits: Sequence[Digit],
    *,
    token_digits: int,
    tokens: Sequence[int],
) -> dict[int, np.ndarray]:
    """Returns the coefficients that the first n tokens stand for, for each n of `tokens`."""
    left_NC = coefficients_NC.astype(np.float64)
    found, decoded_NC = {}, np.zeros_like(left_NC)
    for count, digit in enumerate(digits, start=1):
        step_N = digit.quantise(left_NC[:, digit.coefficient])
        left_NC[:, digit.coefficient] -= step_N
        decoded_NC[:, digit.coefficient] += step_N
        if count % token_digits == 0 and count // token_digits in tokens:
            found[count // token_digits] = decoded_NC.copy()
    return found
