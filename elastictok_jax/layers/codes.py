"""What a token is: an index into a codebook, or a vector of floats.

Dimension key: n tokens, Z values of a token.
"""

import dataclasses
from typing import Any, Protocol

import numpy as np

from elastictok_jax.errors import UsageError


class Code(Protocol):
    """The type of a codec's tokens.

    Attributes:
      dtype, shape: of the array of one token.
      bits: nominal bits of a token.
      levels: sizes of the digits that make up a code; () where codes are no numbers.
      size: number of codes, or 0 where they are not numbered.
    """

    @property
    def dtype(self) -> np.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def bits(self) -> float: ...

    @property
    def levels(self) -> tuple[int, ...]: ...

    @property
    def size(self) -> int: ...

    def check(self, codes: np.ndarray) -> None:
        """Raises UsageError unless `codes` [n, ...] are codes of this type."""
        ...

    def values(self, codes) -> Any:
        """Returns float32 [..., Z] values that are near each other where codes mean the like."""
        ...


@dataclasses.dataclass(frozen=True)
class FSQCode:
    """An index of finite scalar quantisation (arXiv 2309.15505): a digit a dim, the first fastest.

    Attributes:
      levels: the number of values of each dim.
    """

    levels: tuple[int, ...]

    dtype = np.dtype(np.int32)
    shape = ()

    @property
    def size(self) -> int:
        return int(np.prod(self.levels))

    @property
    def bits(self) -> float:
        return float(np.log2(self.size))

    def check(self, codes: np.ndarray) -> None:
        if codes.ndim != 1 or codes.dtype.kind not in "iu":
            raise UsageError("codes of an FSQ model must be whole numbers")
        if codes.min() < 0 or codes.max() >= self.size:
            raise UsageError(f"codes must lie in [0, {self.size})")

    def digits(self, codes):
        """Returns the digits int [..., Z] of codes int [...]."""
        strides = np.cumprod([1, *self.levels[:-1]])
        return (codes[..., None] // strides) % np.asarray(self.levels)

    def values(self, codes):
        """Returns float32 [..., Z] in [-1, 1], the latents that codes stand for."""
        half = np.asarray(self.levels) // 2
        return (self.digits(codes) - half).astype(np.float32) / half


@dataclasses.dataclass(frozen=True)
class FloatCode:
    """A vector of floats.

    Attributes:
      dims: Z.
    """

    dims: int

    dtype = np.dtype(np.float32)
    levels: tuple[int, ...] = ()
    size: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.dims,)

    @property
    def bits(self) -> float:
        return 32.0 * self.dims

    def check(self, codes: np.ndarray) -> None:
        if codes.shape[1:] != self.shape or not np.isfinite(codes).all():
            raise UsageError(f"codes must be finite, {self.dims} values a token")

    def values(self, codes):
        return codes
