"""Counts how often the codes of a codebook occur, and says how much of it is in use."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from elastictok_jax.errors import UsageError

Array = jax.Array


def codebook_counts(codes_BS: Array, weights_BS: Array, *, codebook_size: int) -> Array:
    """float32 [codebook_size]: how often each code occurs, by one scatter-add into the table."""
    return jnp.zeros(codebook_size, jnp.float32).at[codes_BS].add(weights_BS.astype(jnp.float32))


def codebook_use(counts: np.ndarray) -> dict[str, float]:
    """How much of the codebook is in use.

    Returns:
      usage: share of codes seen; perplexity: exp of the entropy of their use, 1 for no tokens.
    """
    share = counts[counts > 0] / max(counts.sum(), 1.0)
    return {
        "usage": float(np.mean(counts > 0)),
        "perplexity": float(np.exp(-np.sum(share * np.log(share)))),
    }


def codebook_statistics(
    codes: np.ndarray | jax.Array | Iterable[np.ndarray | jax.Array], *, size: int
) -> dict[str, float]:
    """Computes exact usage statistics of a codebook of `size` codes.

    `codes` are integers in [0, size): one array of any shape, or an iterable of arrays (such as
    `Tokens.codes`, or a generator over many clips). Returns

    - `tokens`: the number of codes, and `codes_used`: the number of distinct ones;
    - `codebook_usage`: `codes_used` / `size`, which is bounded by the number of tokens;
    - `code_entropy_bits`: the Shannon entropy of their frequencies, in bits per token;
    - `codebook_perplexity`: 2 to that power; `size` if all codes are equally frequent.

    Raises UsageError if there are no codes, or any is not such an integer.
    """
    counts = np.zeros(size, np.int64)
    for array in [codes] if isinstance(codes, np.ndarray | jax.Array) else codes:
        counts += _count_codes(np.asarray(array), size=size)
    tokens = int(counts.sum())
    if not tokens:
        raise UsageError("there are no codes to count")
    use = codebook_use(counts)
    return {
        "tokens": tokens,
        "codes_used": int(np.count_nonzero(counts)),
        "codebook_usage": use["usage"],
        "code_entropy_bits": float(np.log2(use["perplexity"])),
        "codebook_perplexity": use["perplexity"],
    }


def _count_codes(codes: np.ndarray, *, size: int) -> np.ndarray:
    if not np.issubdtype(codes.dtype, np.integer):
        raise UsageError(f"codes are integers, not {codes.dtype}: a VAE has no codebook")
    if codes.size and not (codes.min() >= 0 and codes.max() < size):
        raise UsageError(
            f"codes from {codes.min()} to {codes.max()} do not fit a codebook of {size} codes"
        )
    return np.bincount(codes.reshape(-1).astype(np.int64), minlength=size)
