"""Mesh sizes fill in one -1, and every mesh that does not fit says what would."""

import math

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastictok_jax import config as config_lib
from elastictok_jax.errors import UsageError
from elastictok_jax.parallel.mesh import AXES, make_mesh, mesh_sizes

small = st.integers(1, 6)


def config_of(**overrides):
    config = config_lib.default_config()
    config_lib.override(config, {key.replace("__", "."): v for key, v in overrides.items()})
    return config


def config_with(sizes):
    return config_of(**{f"mesh__{axis}": size for axis, size in sizes.items()})


@given(sizes=st.tuples(small, small, small, small))
@settings(max_examples=50, deadline=None)
def test_sizes_that_make_up_the_devices_are_kept(sizes):
    wanted = dict(zip(AXES, sizes, strict=True))
    assert mesh_sizes(config_with(wanted), devices=math.prod(sizes)) == wanted


@given(
    sizes=st.tuples(small, small, small, small),
    free=st.sampled_from(AXES),
    devices=st.integers(1, 4096),
)
@settings(max_examples=100, deadline=None)
def test_one_free_axis_takes_the_rest_or_says_why_not(sizes, free, devices):
    wanted = dict(zip(AXES, sizes, strict=True)) | {free: -1}
    others = math.prod(size for size in wanted.values() if size > 0)
    if devices % others == 0:
        got = mesh_sizes(config_with(wanted), devices=devices)
        assert got == wanted | {free: devices // others}
        assert math.prod(got.values()) == devices
    else:
        with pytest.raises(UsageError) as caught:
            mesh_sizes(config_with(wanted), devices=devices)
        assert f"{others} does not divide the {devices} devices" in str(caught.value)
        assert f"mesh.{free}=-1" in str(caught.value)


@given(sizes=st.tuples(small, small, small, small), devices=st.integers(1, 64))
@settings(max_examples=50, deadline=None)
def test_fixed_sizes_that_do_not_make_up_the_devices(sizes, devices):
    product = math.prod(sizes)
    config = config_with(dict(zip(AXES, sizes, strict=True)))
    if product == devices:
        return
    message = f"{product} devices are asked for and {devices} are at hand; set one to -1"
    with pytest.raises(UsageError, match=message):
        mesh_sizes(config, devices=devices)


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": -1, "fsdp": -1},
        {"data": 0},
        {"data": -2},
        {"data": 4, "tensor": 0},
    ],
)
def test_sizes_that_mean_nothing(sizes):
    with pytest.raises(UsageError, match="must be positive, and at most one may be -1"):
        mesh_sizes(config_with(sizes), devices=8)


def with_devices(monkeypatch, count):
    """Only the count is consulted before the checks under test; no mesh of that size is made."""
    monkeypatch.setattr(jax, "device_count", lambda: count)


@given(batch=st.integers(1, 200), pieces=st.integers(1, 4), shards=st.sampled_from([2, 4, 8]))
@settings(max_examples=50, deadline=None)
def test_batch_that_is_not_divided_names_the_nearest_that_is(batch, pieces, shards):
    batch *= pieces
    config = config_of(
        data__batch_size=batch, optimizer__accumulate_steps=pieces, mesh__data=2, mesh__fsdp=-1
    )
    unit = shards * pieces
    if batch % unit == 0:
        return
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UsageError) as caught:
        with_devices(patch, shards)
        make_mesh(config)
    text = str(caught.value)
    assert text.startswith(f"data.batch_size = {batch} ")
    assert f"mesh.data x mesh.fsdp = {shards}" in text
    near = int(text.rsplit(" ", 1)[1])
    assert near > 0 and near % unit == 0
    fits = range(unit, batch + 2 * unit, unit)
    assert abs(near - batch) == min(abs(fit - batch) for fit in fits)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model__width": 1022}, "model.width = 1022 is not a multiple of mesh.fsdp = 4"),
        (
            {"mesh__fsdp": 1, "mesh__tensor": 4, "model__heads": 2},
            "model.heads = 2 is not a multiple of mesh.tensor = 4",
        ),
        (
            {"mesh__fsdp": 1, "mesh__tensor": 4, "model__mlp_width": 30},
            "model.mlp_width = 30 is not a multiple of mesh.tensor = 4",
        ),
        (
            {"mesh__fsdp": 1, "mesh__sequence": 4, "data__sequence_blocks": 6},
            "data.sequence_blocks = 6 is not a multiple of mesh.sequence = 4",
        ),
    ],
)
def test_model_and_sequence_that_do_not_divide(monkeypatch, overrides, message):
    with_devices(monkeypatch, 8)
    config = config_of(**({"mesh__data": 2, "mesh__fsdp": 4} | overrides))
    with pytest.raises(UsageError) as caught:
        make_mesh(config)
    assert str(caught.value) == message


def test_mesh_of_the_devices_at_hand():
    mesh = make_mesh(config_of(data__batch_size=jax.device_count()))
    assert mesh.axis_names == AXES
    assert mesh.devices.size == jax.device_count()
    assert dict(mesh.shape) == dict.fromkeys(AXES, 1) | {"data": jax.device_count()}


def test_mesh_of_given_devices_and_no_others(monkeypatch):
    with_devices(monkeypatch, 8)
    given = jax.devices()[:1]
    assert make_mesh(config_of(data__batch_size=1), devices=given).devices.tolist() == [[[given]]]
