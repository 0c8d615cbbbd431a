"""Tokens and .etok files."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from elastictok_jax.errors import UsageError
from elastictok_jax.tokenizer.tokens import Tokens


def make_tokens(lengths, *, largest=63_999, dims=None, seed=0):
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


def test_an_unwritable_place_is_refused(tmp_path):
    with pytest.raises(UsageError, match="cannot be written"):
        make_tokens([1]).save(tmp_path / "no" / "clip.etok")
