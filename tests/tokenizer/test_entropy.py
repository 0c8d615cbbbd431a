"""Entropy-coded FSQ codes: exact, smaller, and refused where they are not what was made."""

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastictok_jax.errors import UsageError
from elastictok_jax.tokenizer import entropy

LEVELS = (8, 8, 8, 5, 5, 5)


def round_trip(codes, *, levels):
    words = entropy.entropy_encode(codes, levels=levels)
    lengths = [len(code) for code in codes]
    decoded = entropy.entropy_decode(words, lengths=lengths, levels=levels)
    assert decoded.dtype == np.int32
    np.testing.assert_array_equal(decoded, np.concatenate(codes))
    return words


def walk(*, blocks, tiles, length, seed=0, change=0.1):
    """Blocks, time first, of which a share of codes changes from time to time."""
    rng = np.random.default_rng(seed)
    now = rng.integers(0, 64_000, (tiles, length))
    codes = []
    for _ in range(blocks // tiles):
        now = np.where(rng.random(now.shape) < change, rng.integers(0, 64_000, now.shape), now)
        codes.extend(now.astype(np.int32))
    return codes


@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=9),
    levels=st.lists(st.integers(2, 20), min_size=1, max_size=6).map(tuple),
    spread=st.sampled_from([1, 2, 10**9]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_codes_of_any_lengths_and_levels_come_back(lengths, levels, spread, seed):
    rng = np.random.default_rng(seed)
    codebook = int(np.prod(levels))
    codes = [rng.integers(0, min(spread, codebook), n).astype(np.int32) for n in lengths]
    round_trip(codes, levels=levels)


@pytest.mark.parametrize(
    "levels", [(2,), (entropy.MAX_LEVELS,), (2, entropy.MAX_LEVELS, 3), (2,) * 30]
)
def test_extreme_levels_come_back(levels):
    rng = np.random.default_rng(1)
    codebook = int(np.prod(levels, dtype=np.int64))
    round_trip([rng.integers(0, codebook, n) for n in (300, 1, 5, 40)], levels=levels)


def test_many_blocks_of_one_token_come_back():
    round_trip([np.asarray([n * n % 64_000]) for n in range(2000)], levels=LEVELS)


def test_random_codes_take_hardly_more_than_their_nominal_bits():
    codes = [np.random.default_rng(2).integers(0, 64_000, 4096) for _ in range(4)]
    words = round_trip(codes, levels=LEVELS)
    assert 32 * len(words) < 1.03 * 4 * 4096 * np.log2(64_000)


@pytest.mark.parametrize("tiles", [1, 6])
def test_what_stays_the_same_at_one_place_costs_little(tiles):
    """A tenth of the codes is new, 1.6 of 16 bits a token; the rest is the cost of saying which."""
    codes = walk(blocks=60, tiles=tiles, length=100)
    words = round_trip(codes, levels=LEVELS)
    assert words[0] == tiles
    assert 32 * len(words) < 0.4 * 6000 * np.log2(64_000)
    shuffled = [codes[index] for index in np.random.default_rng(3).permutation(60)]
    if tiles > 1:
        assert len(round_trip(shuffled, levels=LEVELS)) > len(words)


def test_skewed_codes_without_an_earlier_block_take_fewer_bits():
    digits = np.random.default_rng(4).binomial(4, 0.2, (2000, 6))
    words = round_trip([digits @ np.cumprod([1, *LEVELS[:-1]])], levels=LEVELS)
    assert 32 * len(words) < 0.7 * 2000 * np.log2(64_000)


@pytest.mark.parametrize("levels", [LEVELS, (2,), (2,) * 20])
def test_the_bound_on_tokens_to_a_word_refuses_no_honest_codes(levels):
    """One code for ever is the cheapest there is."""
    round_trip([np.zeros(4096, np.int32)] * 40, levels=levels)


def test_more_tokens_than_words_can_hold_are_refused():
    words = entropy.entropy_encode([np.zeros(10, np.int32)], levels=LEVELS)
    with pytest.raises(ValueError, match="30000000 tokens cannot come from"):
        entropy.entropy_decode(words, lengths=[30_000_000], levels=LEVELS)


@given(place=st.integers(0, 10**6), bit=st.integers(0, 31))
def test_a_changed_word_is_refused_or_changes_nothing(place, bit):
    """Bits beyond the end of the message may change nothing; all else is noticed."""
    codes = walk(blocks=4, tiles=1, length=30)
    words = entropy.entropy_encode(codes, levels=LEVELS)
    words[place % len(words)] ^= np.uint32(1 << bit)
    try:
        decoded = entropy.entropy_decode(words, lengths=[30] * 4, levels=LEVELS)
    except ValueError as error:
        assert not isinstance(error, UsageError)
    else:
        np.testing.assert_array_equal(decoded, np.concatenate(codes))


def test_what_has_no_such_form_is_refused():
    for levels in ((), (entropy.MAX_LEVELS + 1,)):
        with pytest.raises(UsageError, match="no entropy-coded form"):
            entropy.entropy_encode([np.zeros(3, np.int32)], levels=levels)


def test_a_missing_coder_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(UsageError, match=r"elastictok_jax\[compress\]"):
        entropy.entropy_encode([np.zeros(3, np.int32)], levels=LEVELS)


def test_the_form_is_as_it_was():
    """Files are to be read by later versions: these words come from this code, the first of its
    kind, and a change of the model needs another `etok.FORMAT`."""
    codes = [np.arange(start, start + 40_000, 2500) for start in (0, 7, 7)]
    words = [
        1,
        2013750181,
        272632095,
        1345842451,
        2204147175,
        2492867064,
        1313682809,
        464413873,
        2076373148,
        533235124,
        3004336856,
        693699547,
        652610312,
        2717510818,
        4181496528,
    ]
    assert entropy.entropy_encode(codes, levels=LEVELS).tolist() == words
    decoded = entropy.entropy_decode(np.asarray(words, np.uint32), lengths=[16] * 3, levels=LEVELS)
    np.testing.assert_array_equal(decoded, np.concatenate(codes))
