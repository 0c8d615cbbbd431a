"""Parameters survive the file unchanged; damaged and hostile files give UsageError."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from elastictok_jax.errors import UsageError
from elastictok_jax.storage.safetensors import load_safetensors, save_safetensors

PARAMS = {
    "encoder": {
        "in_proj": {"kernel": np.arange(12, dtype=np.float32).reshape(3, 4)},
        "half": np.arange(3, dtype=np.float16),
    },
    "decoder": {"brain": np.arange(5).astype(ml_dtypes.bfloat16), "scalar": np.float32(2.5)},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model.safetensors"
    save_safetensors(path, PARAMS, metadata={"source": "test"})
    return path


def test_round_trip_keeps_tree_values_dtypes_and_metadata(saved):
    params, metadata = load_safetensors(saved)
    assert metadata == {"source": "test"}
    assert set(params) == {"encoder", "decoder"}
    for half in params:
        for name in params[half]:
            got, want = params[half][name], PARAMS[half][name]
            if name == "in_proj":
                got, want = got["kernel"], want["kernel"]
            assert got.dtype == want.dtype and got.shape == want.shape
            np.testing.assert_array_equal(got, want)


def test_transposed_views_are_written_in_their_own_order(tmp_path):
    view = np.arange(12, dtype=np.float32).reshape(3, 4).T[::2]
    save_safetensors(tmp_path / "m", {"a": view}, metadata={})
    np.testing.assert_array_equal(load_safetensors(tmp_path / "m")[0]["a"], view)


def test_failed_save_keeps_the_old_file_and_leaves_nothing_behind(tmp_path, monkeypatch):
    path = tmp_path / "m"
    save_safetensors(path, {"a": np.ones(3, np.float32)}, metadata={})
    before = path.read_bytes()

    def full_disk(flat, temporary, metadata):
        temporary.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(safetensors.numpy, "save_file", full_disk)
    with pytest.raises(UsageError, match="no space left"):
        save_safetensors(path, {"a": np.zeros(3, np.float32)}, metadata={})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("params", "named"),
    [
        ({"a": {"b": np.ones(2, np.int32)}}, "a/b is int32"),
        ({"a/b": np.ones(2, np.float32)}, "a/b"),
        ({"": np.ones(2, np.float32)}, "empty"),
    ],
)
def test_save_refuses_what_load_would_refuse(tmp_path, params, named):
    with pytest.raises(UsageError, match=named):
        save_safetensors(tmp_path / "m", params, metadata={})


def test_save_into_a_missing_folder_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="cannot write"):
        save_safetensors(tmp_path / "no" / "m", PARAMS, metadata={})


def test_missing_file_and_folder_are_usage_errors(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(UsageError, match="no such file"):
            load_safetensors(path)


@settings(max_examples=60)
@given(fraction=st.floats(0, 1, exclude_max=True))
def test_truncation_anywhere_is_a_usage_error(saved, tmp_path_factory, fraction):
    data = saved.read_bytes()
    path = tmp_path_factory.mktemp("cut") / "m"
    path.write_bytes(data[: int(fraction * len(data))])
    with pytest.raises(UsageError, match="not a complete safetensors file"):
        load_safetensors(path)


def _with_header(path, header):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    return path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/".join("a" * 100), "not a weight name"),
        ("a//b", "not a weight name"),
        ("a\nb", "not a weight name"),
    ],
)
def test_hostile_names_are_refused(tmp_path, name, message):
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    with pytest.raises(UsageError, match=message):
        load_safetensors(_with_header(tmp_path / "m", {name: entry}))


def test_hostile_headers_are_refused(tmp_path):
    huge = tmp_path / "huge"
    huge.write_bytes(struct.pack("<Q", 2**63) + b"{}")
    integer = _with_header(
        tmp_path / "integer", {"a": {"dtype": "I32", "shape": [1], "data_offsets": [0, 4]}}
    )
    oversized = _with_header(
        tmp_path / "oversized",
        {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}},
    )
    for path in (huge, integer, oversized):
        with pytest.raises(UsageError, match=path.name):
            load_safetensors(path)


def test_a_weight_under_another_weight_is_refused(tmp_path):
    one = np.ones(1, np.float32)
    safetensors.numpy.save_file({"a": one, "a/b": one}, tmp_path / "m")
    with pytest.raises(UsageError, match="a/b is nested under another"):
        load_safetensors(tmp_path / "m")
