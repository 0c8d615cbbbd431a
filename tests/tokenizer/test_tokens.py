"""Tokens and .etok files."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from elastictok_jax.errors import UsageError
from elastictok_jax.tokenizer import etok
from elastictok_jax.tokenizer.tokens import Tokens

LEVELS = (8, 8, 8, 5, 5, 5)


def make_tokens(lengths, *, largest=63_999, dims=None, levels=(), seed=0):
    rng = np.random.default_rng(seed)
    if dims is None:
        codes = [rng.integers(0, largest + 1, n).astype(np.int32) for n in lengths]
    else:
        codes = [rng.standard_normal((n, dims)).astype(np.float32) for n in lengths]
    count = len(lengths)
    return Tokens(
        codes=codes,
        mse=rng.random(count).astype(np.float32),
        met=rng.random(count) < 0.5,
        frames=4 * count,
        height=48,
        width=64,
        fps=24000 / 1001,
        bits_per_token=16.0,
        fingerprint="0123456789abcdef",
        window_blocks=3,
        levels=levels,
    )


def assert_same(a, b):
    for field in dataclasses.fields(Tokens):
        left, right = getattr(a, field.name), getattr(b, field.name)
        if field.name == "codes":
            assert len(left) == len(right)
            for x, y in zip(left, right, strict=True):
                assert x.dtype == y.dtype
                np.testing.assert_array_equal(x, y)
        else:
            np.testing.assert_array_equal(left, right)


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    largest=st.sampled_from([0, 255, 256, 63_999, 70_000]),
    dims=st.sampled_from([None, 1, 8]),
)
def test_round_trip(tmp_path_factory, lengths, largest, dims):
    path = tmp_path_factory.mktemp("etok") / "clip.etok"
    tokens = make_tokens(lengths, largest=largest, dims=dims)
    tokens.save(path)
    assert_same(Tokens.load(path), tokens)
    assert tokens.num_tokens == sum(lengths)
    assert tokens.bits == 16.0 * sum(lengths)


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    levels=st.sampled_from([LEVELS, (2,), (7, 3, 256)]),
    coding=st.sampled_from(etok.CODINGS),
    seed=st.integers(0, 99),
)
def test_round_trip_of_either_coding(tmp_path_factory, lengths, levels, coding, seed):
    path = tmp_path_factory.mktemp("etok") / "clip.etok"
    tokens = make_tokens(lengths, largest=int(np.prod(levels)) - 1, levels=levels, seed=seed)
    tokens.save(path, coding=coding)
    assert_same(Tokens.load(path), tokens)
    stored = load_file(path)
    assert ("words" in stored) == (coding == "entropy")
    if coding == "entropy":
        assert 8 * stored["words"].nbytes == tokens.entropy_coded_bits()


def test_the_entropy_form_of_a_still_clip_is_a_fraction_of_the_plain_one(tmp_path):
    tokens = make_tokens([256] * 20, levels=LEVELS)
    still = dataclasses.replace(tokens, codes=[tokens.codes[0]] * 20)
    for coding in etok.CODINGS:
        still.save(tmp_path / coding, coding=coding)
    sizes = {coding: (tmp_path / coding).stat().st_size for coding in etok.CODINGS}
    assert sizes["entropy"] < 0.35 * sizes["plain"]


def test_what_has_no_entropy_form_is_refused(tmp_path):
    path = tmp_path / "clip.etok"
    for tokens in (make_tokens([3], dims=2), make_tokens([3])):
        with pytest.raises(UsageError, match="no entropy-coded form"):
            tokens.save(path, coding="entropy")
        with pytest.raises(UsageError, match="no entropy-coded form"):
            tokens.entropy_coded_bits()
    with pytest.raises(UsageError, match="coding 'zip'"):
        make_tokens([3]).save(path, coding="zip")
    assert not path.exists()


@pytest.mark.parametrize(
    "fields",
    [
        {"mse": np.asarray([np.nan], np.float32)},
        {"mse": np.asarray([-1], np.float32)},
        {"mse": np.zeros(2, np.float32)},
        {"codes": [np.asarray([64_000], np.int32)]},
        {"codes": [np.asarray([-1], np.int32)]},
        {"codes": [np.asarray([1], np.int64)]},
        {"codes": [np.zeros(0, np.int32)]},
        {"codes": []},
        {"codes": [np.full((1, 2), np.inf, np.float32)], "levels": ()},
        {"codes": [np.zeros((1, 2), np.float32)]},
        {"levels": (8, 1)},
        {"levels": (2,) * 32},
        {"frames": 0},
        {"frames": True},
        {"width": 2**40},
        {"fps": float("nan")},
        {"bits_per_token": -1.0},
        {"fingerprint": "a\nb"},
    ],
)
def test_what_load_would_refuse_is_not_written(tmp_path, fields):
    path = tmp_path / "clip.etok"
    with pytest.raises(UsageError, match=r"clip\.etok cannot be written: these tokens are unsound"):
        dataclasses.replace(make_tokens([1], levels=LEVELS), **fields).save(path)
    assert not path.exists()


@pytest.mark.parametrize(
    ("largest", "dtype"), [(255, np.uint8), (256, np.uint16), (70_000, np.uint32)]
)
def test_codes_take_the_smallest_type_that_holds_them(tmp_path, largest, dtype):
    tokens = make_tokens([3])
    tokens.codes[0][0] = largest
    tokens.codes[0][1:] = 0
    tokens.save(tmp_path / "clip.etok")
    assert load_file(tmp_path / "clip.etok")["codes"].dtype == dtype


@given(cut=st.floats(0, 0.999))
def test_a_truncated_file_is_refused(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("etok") / "clip.etok"
    make_tokens([5, 2]).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(cut * len(whole))])
    with pytest.raises(UsageError, match=r"clip\.etok is damaged"):
        Tokens.load(path)


def test_missing_foreign_and_inconsistent_files_are_refused(tmp_path):
    path = tmp_path / "clip.etok"
    with pytest.raises(UsageError, match="does not exist"):
        Tokens.load(path)
    save_file({"codes": np.zeros(3, np.uint8)}, path)
    with pytest.raises(UsageError, match="format"):
        Tokens.load(path)
    tokens = make_tokens([5, 2])
    tokens.save(path)
    with open(path, "rb") as file:
        raw = file.read()
    assert b'"format":"etok-2"' in raw
    arrays = load_file(path)
    arrays["lengths"] = np.asarray([5, 3], np.int32)
    text = {"format": "etok-2", "fingerprint": "x", "frames": "8", "height": "4", "width": "4"}
    save_file(arrays, path, metadata=text | {"fps": "0", "bits_per_token": "16"})
    with pytest.raises(UsageError, match="damaged"):
        Tokens.load(path)


@given(
    pieces=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    tiles=st.integers(1, 3),
    missing=st.integers(0, 3),
)
def test_pieces_join_to_the_clip_that_they_were_cut_from(pieces, tiles, missing):
    blocks = sum(pieces)
    whole = make_tokens([3] * (blocks * tiles), levels=LEVELS)
    whole = dataclasses.replace(whole, frames=4 * blocks - missing)
    cut, start = [], 0
    for count in pieces:
        span = slice(start * tiles, (start + count) * tiles)
        part = {name: getattr(whole, name)[span] for name in ("codes", "mse", "met")}
        frames = min(4 * count, whole.frames - 4 * start)
        cut.append(dataclasses.replace(whole, frames=frames, **part))
        start += count
    assert_same(Tokens.join(cut), whole)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"fingerprint": "ff"}, "fingerprint ff"),
        ({"height": 1}, "height 1"),
        ({"width": 1}, "width 1"),
        ({"fps": 1.0}, "fps 1.0"),
        ({"levels": (8, 8)}, "levels"),
        ({"bits_per_token": 1.0}, "bits_per_token 1.0"),
        ({"frames": 9}, "9 frames in 2 blocks"),
    ],
)
def test_pieces_of_another_clip_are_not_joined(fields, named):
    piece = make_tokens([2, 2], levels=LEVELS)
    with pytest.raises(UsageError, match=f"piece 1 .*{named}"):
        Tokens.join([piece, dataclasses.replace(piece, **fields)])


def test_only_the_last_piece_may_end_within_a_block():
    piece = make_tokens([2, 2])
    short = dataclasses.replace(piece, frames=7)
    assert Tokens.join([piece, piece, short]).frames == 23
    with pytest.raises(UsageError, match="piece 1 has 7 frames in 2 blocks, the first 8 in 2"):
        Tokens.join([piece, short, piece])
    with pytest.raises(UsageError, match="cut the clip where blocks end"):
        Tokens.join([short, piece])
    with pytest.raises(UsageError, match="no pieces"):
        Tokens.join([])


def test_an_unwritable_place_is_refused(tmp_path):
    with pytest.raises(UsageError, match="cannot be written"):
        make_tokens([1]).save(tmp_path / "no" / "clip.etok")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be written"):
        make_tokens([1]).save(tmp_path / "file" / "clip.etok")
