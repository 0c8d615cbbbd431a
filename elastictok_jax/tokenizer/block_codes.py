"""The codes of a clip's blocks, stored in one array.

Dimension key: N blocks, S tokens of all blocks, Z latent dims.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np


class BlockCodes(Sequence[np.ndarray]):
    """A sequence of N arrays, [n] or [n, Z], that are views of one array.

    Millions of short arrays would take many times the memory of their codes.

    Attributes:
      flat: [S] or [S, Z], the concatenated codes of all blocks.
      lengths: int32 [N].
    """

    def __init__(self, flat: np.ndarray, lengths: np.ndarray) -> None:
        self.flat, self.lengths = flat, lengths.astype(np.int32, copy=False)
        self._ends = np.cumsum(lengths, dtype=np.int64)
        assert len(flat) == (self._ends[-1] if len(lengths) else 0)

    @classmethod
    def of(cls, codes: Iterable[np.ndarray]) -> "BlockCodes":
        """Concatenates `codes`, which must agree in dtype and trailing shape."""
        if isinstance(codes, cls):
            return codes
        codes = list(codes)
        return cls(np.concatenate(codes), np.asarray([len(code) for code in codes], np.int32))

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...

    @overload
    def __getitem__(self, index: slice) -> "BlockCodes": ...

    def __getitem__(self, index):
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                return BlockCodes.of([self[place] for place in range(start, stop, step)])
            stop = max(start, stop)
            return BlockCodes(
                self.flat[self._start(start) : self._start(stop)], self.lengths[start:stop]
            )
        place = range(len(self))[index]
        return self.flat[self._start(place) : self._start(place + 1)]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[place] for place in range(len(self)))

    def _start(self, place: int) -> int:
        return int(self._ends[place - 1]) if place else 0


def block_code_lengths(codes: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the number of tokens in each block, int32 [N]."""
    if isinstance(codes, BlockCodes):
        return codes.lengths
    return np.asarray([len(code) for code in codes], np.int32)
