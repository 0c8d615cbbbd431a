"""Mesh sizes fill in one -1, and every mesh that does not fit says what would."""

import math
import os
import subprocess
import sys

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastictok_jax import config as config_lib
from elastictok_jax.errors import UsageError
from elastictok_jax.parallel.mesh import AXES, check_mesh_fits, mesh_sizes
from tests.tiny import mesh_of, task_of

small = st.integers(1, 6)


def config_of(**overrides):
    config = config_lib.default_config()
    config_lib.apply_overrides(config, {key.replace("__", "."): v for key, v in overrides.items()})
    return config


def config_with(sizes):
    return config_of(**{f"mesh__{axis}": size for axis, size in sizes.items()})


@given(sizes=st.tuples(small, small, small, small))
@settings(max_examples=50)
def test_sizes_that_make_up_the_devices_are_kept(sizes):
    wanted = dict(zip(AXES, sizes, strict=True))
    assert mesh_sizes(config_with(wanted), devices=math.prod(sizes)) == wanted


@given(
    sizes=st.tuples(small, small, small, small),
    free=st.sampled_from(AXES),
    devices=st.integers(1, 4096),
)
@settings(max_examples=100)
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
@settings(max_examples=50)
def test_fixed_sizes_that_do_not_make_up_the_devices(sizes, devices):
    product = math.prod(sizes)
    config = config_with(dict(zip(AXES, sizes, strict=True)))
    if product == devices:
        return
    message = f"{product} devices are requested and {devices} are available; set one to -1"
    with pytest.raises(UsageError, match=message):
        mesh_sizes(config, devices=devices)


def require_fits(config, sizes):
    check_mesh_fits(config, sizes, task_of(config).check_mesh)


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


@given(batch=st.integers(1, 200), pieces=st.integers(1, 4), shards=st.sampled_from([2, 4, 8]))
@settings(max_examples=50)
def test_batch_that_is_not_divided_names_the_nearest_that_is(batch, pieces, shards):
    batch *= pieces
    config = config_of(
        data__batch_size=batch, optimizer__accumulate_steps=pieces, mesh__data=2, mesh__fsdp=-1
    )
    unit = shards * pieces
    if batch % unit == 0:
        return
    with pytest.raises(UsageError) as caught:
        require_fits(config, mesh_sizes(config, devices=shards))
    text = str(caught.value)
    assert text.startswith(f"data.batch_size = {batch} ")
    assert f"mesh.data x mesh.fsdp = {shards}" in text
    near = int(text.rsplit(" ", 1)[1])
    assert near > 0 and near % unit == 0
    fits = range(unit, batch + 2 * unit, unit)
    assert abs(near - batch) == min(abs(fit - batch) for fit in fits)


@pytest.mark.parametrize(
    ("sizes", "overrides", "message"),
    [
        (
            {"fsdp": 4},
            {"model__width": 1018, "model__heads": 1},
            "model.width = 1018 is not a multiple of mesh.fsdp = 4; "
            "the nearest that fit are 1016 and 1020",
        ),
        (
            {"fsdp": 3},
            {"data__batch_size": 9},  # heads of an even width must still fit: steps of 48
            "model.width = 1024 is not a multiple of mesh.fsdp = 3; "
            "the nearest that fit are 1008 and 1056",
        ),
        (
            {"tensor": 4},
            {"model__heads": 2},
            "model.heads = 2 is not a multiple of mesh.tensor = 4; the nearest that fits is 4",
        ),
        (
            {"tensor": 3},
            {},  # no multiple of 3 divides a width of 1024
            "model.heads = 8 is not a multiple of mesh.tensor = 3; "
            "none fits: make that axis smaller",
        ),
        (
            {"tensor": 4},
            {"model__mlp_width": 30},
            "model.mlp_width = 30 is not a multiple of mesh.tensor = 4; "
            "the nearest that fit are 28 and 32",
        ),
        (
            {"sequence": 12},
            {"data__sequence_blocks": 4},  # of 4096 tokens: 4 of the 12 shards cut no block evenly
            "data.sequence_blocks = 4 x 4096 tokens is not a multiple of mesh.sequence = 12; "
            "the nearest that fit are 3 and 6",
        ),
        (
            {"sequence": 12},
            {"data__sequence_blocks": 4, "mesh__dcn_sequence": 3},
            "data.sequence_blocks = 4 x 4096 tokens is not a multiple of "
            "mesh.sequence x mesh.dcn_sequence = 12; the nearest that fit are 3 and 6",
        ),
    ],
)
def test_model_and_sequence_that_do_not_divide(sizes, overrides, message):
    with pytest.raises(UsageError) as caught:
        require_fits(config_of(**overrides), dict.fromkeys(AXES, 1) | sizes)
    assert str(caught.value) == message


def test_a_sequence_may_be_cut_within_its_blocks():
    require_fits(config_of(data__sequence_blocks=1), dict.fromkeys(AXES, 1) | {"sequence": 8})


def test_more_slices_than_are_at_hand():
    with pytest.raises(UsageError) as caught:
        mesh_of(config_of(mesh__dcn_fsdp=2))
    assert str(caught.value) == (
        "mesh.dcn_data=1, mesh.dcn_fsdp=2, mesh.dcn_tensor=1, mesh.dcn_sequence=1: 2 processes "
        "are requested and 1 are available; set one to -1 to take what is left"
    )


def test_one_process_is_a_mesh_of_one_slice():
    config = config_of(data__batch_size=jax.device_count(), mesh__dcn_sequence=-1)
    assert mesh_of(config) == mesh_of(config_of(data__batch_size=jax.device_count()))


TOPOLOGIES = """
import math, sys
from jax.experimental import topologies
from elastictok_jax import config as config_lib
from elastictok_jax.errors import UsageError

def mesh(devices, **sizes):
    config = config_lib.default_config()
    values = {"data.batch_size": 512, "data.sequence_blocks": 256}
    config_lib.override(config, values | {f"mesh.{axis}": n for axis, n in sizes.items()})
    return mesh_of(config_lib.resolve(config), devices)

one = topologies.get_topology_desc(
    platform="tpu", topology_name="v4:8x8x4", chips_per_host_bounds=(2, 2, 1),
    chip_config_name="megacore",
).devices
ring = mesh(one, data=1, sequence=-1).devices.reshape(-1)
assert len(ring) == 256
torus = (8, 8, 4)
for here, there in zip(ring, [*ring[1:], ring[0]]):
    apart = [min((a - b) % n, (b - a) % n) for a, b, n in zip(here.coords, there.coords, torus)]
    assert sum(apart) <= 3, (here.coords, there.coords)
assert mesh(one, data=2, fsdp=4, tensor=8, sequence=-1).devices.shape == (2, 4, 8, 4)
two = topologies.get_topology_desc(
    platform="tpu", topology_name="v5e:16x16", num_slices=2
).devices
hybrid = mesh(two, data=4, fsdp=8, tensor=-1, dcn_fsdp=2)
assert hybrid.devices.shape == (4, 16, 8, 1)
slices = [[d.slice_index for d in hybrid.devices[:, row].flat] for row in range(16)]
assert slices == [[0] * 32] * 8 + [[1] * 32] * 8  # no other axis leaves a slice
try:
    mesh(two, data=-1)
except UsageError as error:
    assert "the devices are 2 slices" in str(error) and "mesh.dcn_data=-1" in str(error)
else:
    sys.exit("two slices were taken for one")
"""


def test_meshes_of_described_tpus():
    """Needs libtpu (`pip install 'jax[tpu]'`), which describes any TPU on any machine."""
    pytest.importorskip("libtpu")
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no TPU is used, so that nothing is shared
        "TPU_ACCELERATOR_TYPE": "v4-512",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    done = subprocess.run(
        [sys.executable, "-c", TOPOLOGIES],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def test_mesh_of_the_devices_at_hand():
    mesh = mesh_of(config_of(data__batch_size=jax.device_count()))
    assert mesh.axis_names == AXES
    assert mesh.devices.size == jax.device_count()
    assert dict(mesh.shape) == dict.fromkeys(AXES, 1) | {"data": jax.device_count()}


def test_mesh_of_given_devices_and_no_others():
    given = jax.devices()[:1]
    assert mesh_of(config_of(data__batch_size=1), devices=given).devices.tolist() == [[[given]]]
