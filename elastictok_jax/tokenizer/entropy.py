"""Lossless compression of FSQ codes: arithmetic coding with a model that adapts to the clip.

Dimension key: N blocks, S tokens of all blocks, C tokens of a chunk, Z latent dims, V values
(levels) of one dim.

A code has Z digits, first dim fastest (`bottlenecks.FSQ`). Each dim has a table of digit counts
for each context: the digit at the same position `stride` blocks earlier, or if there is none, the
digit of the preceding dim in the same token. A table is smoothed by the dim's overall counts.
Counts are updated after each chunk, so that a chunk is coded in one call. The decoder repeats the
same integer arithmetic, which is exact on any machine.
"""

import importlib.util
import zlib
from collections.abc import Iterator, Sequence

import numpy as np

from elastictok_jax.errors import UsageError
from elastictok_jax.tokenizer.block_codes import BlockCodes, block_code_lengths

MAX_LEVELS = 256  # per dim: bounds the tables
_SHARED_WEIGHT = 4  # weight of the dim's overall counts in a context, in observations
_SAME_WEIGHT = 16  # prior for the same digit as in the earlier block, in observations
_FORGET_AT = 1024  # a table with more observations is halved
_FLOOR = 256  # at least 1/_FLOOR of the probability is spread over all digits
_MIN_BITS_PER_DIGIT = 1 / 400  # a lower bound on the cost of a digit, due to that floor
_SMALLEST_CHUNK, _LARGEST_CHUNK = 4, 256  # tokens
_STRIDE_SAMPLE = 2**18  # tokens examined to choose the stride
_HEAD_WORDS = 2  # stride, checksum


def is_entropy_coder_installed() -> bool:
    """Returns whether the extra [compress] is installed."""
    return importlib.util.find_spec("constriction") is not None


def require_entropy_coder(levels: tuple[int, ...]) -> None:
    """Raises UsageError if `entropy_encode` would, so that callers can fail early."""
    _require_levels(levels)
    _coder()


def entropy_encode(codes: Sequence[np.ndarray], *, levels: tuple[int, ...]) -> np.ndarray:
    """Encodes N blocks of codes, int [n] with n >= 1, below prod(levels), as uint32 [words].

    Raises:
      UsageError: if the coder is not installed, or `levels` is empty or exceeds MAX_LEVELS.
    """
    _require_levels(levels)
    likely = _likely_stride(codes, levels=levels)
    none_earlier = len(codes)
    return min((_encode(codes, levels, stride=s) for s in (likely, none_earlier)), key=len)


def _encode(codes: Sequence[np.ndarray], levels: tuple[int, ...], *, stride: int) -> np.ndarray:
    codes_S = BlockCodes.of(codes).flat.astype(np.int32)
    lengths = block_code_lengths(codes).astype(np.int64)
    model, places = _Model(levels), _Places(lengths, stride=stride)
    encoder = _coder().stream.queue.RangeEncoder()
    for chunk in places.chunks():
        earlier_C, known_C = places.earlier(chunk)
        before_CZ = _digits(codes_S[earlier_C], levels)
        digits_CZ = _digits(codes_S[chunk], levels)
        for dim in range(len(levels)):
            contexts_C = model.contexts(dim, before_CZ, known_C, digits_CZ)
            encoder.encode(digits_CZ[:, dim], _family(), model.weights(dim, contexts_C))
            model.update(dim, contexts_C, digits_CZ[:, dim])
    head = np.asarray([stride, _checksum(codes_S)], np.uint32)
    return np.concatenate([head, encoder.get_compressed()])


def entropy_decode(
    words: np.ndarray, *, lengths: Sequence[int] | np.ndarray, levels: tuple[int, ...]
) -> np.ndarray:
    """Inverts `entropy_encode`: returns the codes of all blocks concatenated, int32 [S].

    Raises:
      UsageError: as `entropy_encode`.
      ValueError: if `words` do not encode blocks of these lengths. More tokens than the words
        could hold are rejected before memory is allocated for them.
    """
    _require_levels(levels)
    lengths = np.asarray(lengths, np.int64)
    total = int(lengths.sum())
    if len(words) < _HEAD_WORDS or words.dtype != np.uint32:
        raise ValueError(f"{len(words)} words of entropy-coded tokens")
    stride = int(words[0])
    if not 1 <= stride <= len(lengths):
        raise ValueError(f"entropy-coded tokens have stride {stride} for {len(lengths)} blocks")
    # The words of the head leave enough slack for the coder's own terminator.
    if total * len(levels) * _MIN_BITS_PER_DIGIT > 32 * len(words):
        raise ValueError(f"{total} tokens cannot come from {len(words)} entropy-coded words")
    model, places = _Model(levels), _Places(lengths, stride=stride)
    decoder = _coder().stream.queue.RangeDecoder(words[_HEAD_WORDS:])
    codes_S = np.zeros(total, np.int32)
    radix = np.cumprod([1, *levels[:-1]])
    for chunk in places.chunks():
        earlier_C, known_C = places.earlier(chunk)
        before_CZ = _digits(codes_S[earlier_C], levels)
        digits_CZ = np.zeros_like(before_CZ)
        for dim in range(len(levels)):
            contexts_C = model.contexts(dim, before_CZ, known_C, digits_CZ)
            try:
                digits_CZ[:, dim] = decoder.decode(_family(), model.weights(dim, contexts_C))
            except AssertionError as error:  # the coder's way of saying that the words are invalid
                raise ValueError(f"entropy-coded tokens: {error}") from None
            model.update(dim, contexts_C, digits_CZ[:, dim])
        codes_S[chunk] = digits_CZ @ radix
    if _checksum(codes_S) != int(words[1]):
        raise ValueError("entropy-coded tokens do not match their checksum")
    return codes_S


class _Model:
    """Counts of digits by dim and context."""

    def __init__(self, levels: tuple[int, ...]) -> None:
        self._levels = levels
        self._shared_V = [np.ones(values, np.int64) for values in levels]
        # Contexts of a dim: its own V digits in the earlier block, then those of the preceding dim.
        self._tables = [
            np.concatenate(
                [
                    _SAME_WEIGHT * np.eye(values, dtype=np.int64),
                    np.zeros((before, values), np.int64),
                ]
            )
            for values, before in zip(levels, (1, *levels[:-1]), strict=True)
        ]

    def contexts(
        self, dim: int, before_CZ: np.ndarray, known_C: np.ndarray, digits_CZ: np.ndarray
    ) -> np.ndarray:
        """Returns rows of the dim's table, int [C]; reads only preceding dims of `digits_CZ`."""
        of_token = digits_CZ[:, dim - 1] if dim else 0
        return np.where(known_C, before_CZ[:, dim], self._levels[dim] + of_token)

    def weights(self, dim: int, contexts_C: np.ndarray) -> np.ndarray:
        """Returns unnormalised probabilities, float64 [C, V] with integer values."""
        shared_V = self._shared_V[dim]
        weights_CV = self._tables[dim][contexts_C] * shared_V.sum() + _SHARED_WEIGHT * shared_V
        floor = weights_CV.sum(axis=1, keepdims=True) // (_FLOOR * self._levels[dim])
        return (weights_CV + floor + 1).astype(np.float64)

    def update(self, dim: int, contexts_C: np.ndarray, digits_C: np.ndarray) -> None:
        shared_V, table = self._shared_V[dim], self._tables[dim]
        np.add.at(shared_V, digits_C, 1)
        np.add.at(table, (contexts_C, digits_C), 1)
        if shared_V.sum() > _FORGET_AT:
            shared_V[:] = (shared_V + 1) // 2
        table[table.sum(axis=1) > _FORGET_AT] //= 2


class _Places:
    """Positions of tokens within their blocks, and the chunks in which they are coded."""

    def __init__(self, lengths_N: np.ndarray, *, stride: int) -> None:
        self._lengths_N, self._stride = lengths_N, stride
        self._ends_N = np.cumsum(lengths_N)

    def chunks(self) -> Iterator[slice]:
        """Yields consecutive spans of tokens.

        Chunks are small at first, when there is most to learn, and end after every `stride` blocks,
        so that these are context for the next ones.
        """
        ends = self._ends_N[self._stride - 1 :: self._stride]
        start, total = 0, int(self._ends_N[-1])
        while start < total:
            stop = start + min(max(start // 8, _SMALLEST_CHUNK), _LARGEST_CHUNK)
            next_end = np.searchsorted(ends, start + _SMALLEST_CHUNK)
            if next_end < len(ends):
                stop = min(stop, int(ends[next_end]))
            stop = min(stop, total)
            yield slice(start, stop)
            start = stop

    def earlier(self, chunk: slice) -> tuple[np.ndarray, np.ndarray]:
        """Finds the token at the same position `stride` blocks earlier.

        Returns:
          int [C], its index or 0; and bool [C], whether it exists and precedes this chunk.
        """
        tokens_C = np.arange(chunk.start, chunk.stop)
        blocks_C = np.searchsorted(self._ends_N, tokens_C, side="right")
        starts_N = self._ends_N - self._lengths_N
        places_C = tokens_C - starts_N[blocks_C]
        back_C = blocks_C - self._stride
        earlier_C = starts_N[back_C] + places_C
        known_C = (back_C >= 0) & (places_C < self._lengths_N[back_C]) & (earlier_C < chunk.start)
        return np.where(known_C, earlier_C, 0), known_C


def _likely_stride(codes: Sequence[np.ndarray], *, levels: tuple[int, ...]) -> int:
    """Estimates the distance in blocks between successive times of one tile.

    That is 1, or the number of tiles per frame. Returns the divisor of N at which the most digits
    equal those that many blocks earlier.
    """
    count = len(codes)
    lengths, flat = block_code_lengths(codes).astype(np.int64), BlockCodes.of(codes).flat
    width = min(int(lengths.max()), max(1, _STRIDE_SAMPLE // count))
    heads = np.full((count, width, len(levels)), -1, np.int32)
    is_code = np.arange(width) < lengths[:, None]
    places = (np.cumsum(lengths) - lengths)[:, None] + np.arange(width)
    heads[is_code] = _digits(flat[places[is_code]].astype(np.int32), levels)

    def equal_digits(stride: int) -> int:
        return int(((heads[stride:] == heads[:-stride]) & (heads[stride:] >= 0)).sum())

    strides = np.flatnonzero(count % np.arange(1, max(count, 2)) == 0) + 1
    return max((int(s) for s in strides if s < count), key=equal_digits, default=1)


def _digits(codes_C: np.ndarray, levels: tuple[int, ...]) -> np.ndarray:
    """Returns the digit of each dim, int32 [C, Z]."""
    digits = codes_C[:, None] // np.cumprod([1, *levels[:-1]]) % np.asarray(levels)
    return digits.astype(np.int32)


def _checksum(codes_S: np.ndarray) -> int:
    return zlib.crc32(codes_S.astype("<i4").tobytes())


def _require_levels(levels: tuple[int, ...]) -> None:
    if not levels or max(levels) > MAX_LEVELS:
        raise UsageError(
            f"levels {levels} have no entropy-coded form: it is for an FSQ of at most "
            f"{MAX_LEVELS} levels per dim, so use the plain form"
        )


def _coder():
    try:
        import constriction
    except ImportError:
        raise UsageError(
            "entropy-coded tokens need an extra: pip install 'elastictok_jax[compress]'"
        ) from None
    return constriction


def _family():
    """Returns the family of categorical distributions, with probabilities given per digit."""
    return _coder().stream.model.Categorical(perfect=False)
