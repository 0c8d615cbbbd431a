"""Attention on a mesh equals the dense reference on one device: forward and gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from elastictok_jax.errors import UsageError
from elastictok_jax.layers.attention.api import SequenceLayout, attention
from elastictok_jax.layers.attention.dense import dense_attention
from elastictok_jax.layers.attention.ring import ring_reach
from elastictok_jax.parallel.mesh import AXES
from elastictok_jax.parallel.sharding import with_logical_axes

H, K = 2, 4


def mesh_of(data=1, fsdp=1, tensor=1, sequence=1):
    sizes = (data, fsdp, tensor, sequence)
    devices = np.array(jax.devices()[: np.prod(sizes)]).reshape(sizes)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def inputs(batch, tokens, *, seed=0, dtype=jnp.float32):
    """Query, key, value, cotangent; and clips of any lengths with padding at the end."""
    rng = np.random.default_rng(seed)
    arrays = [jnp.asarray(rng.normal(size=(batch, tokens, H, K)), dtype) for _ in range(4)]
    segments = np.sort(rng.integers(1, 4, (batch, tokens)), axis=1)
    segments[:, tokens - tokens // 7 :] = 0
    return arrays, segments.astype(np.int32)


def reference(arrays, segments, length):
    *qkv, cotangent = (x.astype(jnp.float32) for x in arrays)
    block_S = np.arange(segments.shape[1]) // length

    def dense(query, key, value):
        return dense_attention(
            *(query, key, value),
            query_segments_BS=segments,
            key_segments_BT=segments,
            rank_mask_BST=block_S[None, :] <= block_S[:, None],
        )

    @jax.jit
    def run(qkv, cotangent):
        out, pull = jax.vjp(dense, *qkv)
        return out, *pull(cotangent)

    return run(qkv, cotangent)


def on_mesh(mesh, arrays, segments, length, backend):
    @jax.jit
    def run(arrays, segments):
        *qkv, cotangent = arrays
        places = SequenceLayout(jnp.arange(segments.shape[1]), segments, length)
        out, pull = jax.vjp(lambda *qkv: attention(*qkv, places=places, backend=backend), *qkv)
        return out, *pull(cotangent)

    return with_logical_axes(run, mesh)(arrays, segments)


def check(mesh, *, batch, tokens, length, backend, dtype=jnp.float32, tolerance=1e-5):
    arrays, segments = inputs(batch, tokens, seed=tokens, dtype=dtype)
    results = on_mesh(mesh, arrays, segments, length, backend)
    wanted = reference(arrays, segments, length)
    for name, got, want in zip(("out", "query", "key", "value"), results, wanted, strict=True):
        assert np.abs(want).max() > 0.1
        np.testing.assert_allclose(
            np.asarray(got, np.float32), want, atol=tolerance, rtol=0, err_msg=name
        )


# (devices, tokens, tokens a block): blocks that end with shards, halves or neither; that lie over
# several shards or all; shards of odd size; tokens that the devices do not divide.
RINGS = [
    (1, 16, 4),
    (2, 16, 4),
    (2, 18, 6),
    (3, 24, 4),
    (3, 21, 5),
    (4, 32, 8),
    (4, 30, 4),
    (5, 40, 8),
    (5, 30, 30),
    (6, 36, 12),
    (7, 28, 4),
    (8, 64, 4),
    (8, 64, 8),
    (8, 64, 32),
    (8, 61, 7),
]


@pytest.mark.parametrize(("devices", "tokens", "length"), RINGS)
def test_rings_of_every_size(devices, tokens, length):
    mesh = mesh_of(sequence=devices)
    check(mesh, batch=2, tokens=tokens, length=length, backend="blockwise")


@pytest.mark.parametrize("backend", ["dense", "splash", "fused"])
@pytest.mark.parametrize(
    ("devices", "tokens", "length"),
    # Four devices are also those of test_bfloat16_rings.
    [(2, 16, 4), (3, 21, 5), pytest.param(4, 32, 8, marks=pytest.mark.slow), (8, 64, 8)],
)
def test_rings_of_every_backend(backend, devices, tokens, length):
    mesh = mesh_of(sequence=devices)
    check(mesh, batch=1, tokens=tokens, length=length, backend=backend)


@pytest.mark.parametrize("backend", ["dense", "blockwise", "splash", "fused"])
def test_bfloat16_rings(backend):
    """To three roundings (2^-9) of values and gradients that reach 4."""
    mesh = mesh_of(sequence=4)
    settings = dict(dtype=jnp.bfloat16, tolerance=3 * 4 * 2.0**-9)
    check(mesh, batch=1, tokens=32, length=8, backend=backend, **settings)


@pytest.mark.parametrize("backend", ["dense", "blockwise", "splash", "fused"])
def test_batch_heads_and_sequence_are_shared(backend):
    mesh = mesh_of(data=2, tensor=2, sequence=2)
    check(mesh, batch=2, tokens=24, length=6, backend=backend)


def test_what_the_mesh_does_not_divide_is_whole_everywhere():
    check(mesh_of(data=2, tensor=4), batch=3, tokens=24, length=6, backend="blockwise")


def test_devices_hold_their_part_alone():
    mesh = mesh_of(fsdp=2, tensor=2, sequence=2)
    arrays, segments = inputs(2, 64)
    sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "sequence", "tensor"))
    arrays = [jax.device_put(x, sharding) for x in arrays]
    for result in on_mesh(mesh, arrays, segments, 16, "blockwise"):
        assert result.addressable_shards[0].data.shape == (1, 32, 1, K)


def test_reach_of_blocks():
    assert ring_reach(8, shards=4, tokens_per_block=4) == 0  # blocks end with halves
    assert ring_reach(8, shards=4, tokens_per_block=8) == 1  # a block is two halves
    assert ring_reach(8, shards=4, tokens_per_block=32) == 7  # one block is everything
    assert ring_reach(8, shards=4, tokens_per_block=6) == 1  # the end of a half is in the next


def score_products(mesh, tokens, length):
    """Multiplications of query and key that a device does, by the shapes in its program."""
    arrays, segments = inputs(1, tokens)
    query, key, value, _ = arrays

    def run(query, key, value, segments):
        places = SequenceLayout(jnp.arange(tokens), segments, length)
        return attention(query, key, value, places=places, backend="dense")

    with jax.set_mesh(mesh):
        traced = with_logical_axes(jax.make_jaxpr(run), mesh)(query, key, value, segments)
    return count_scores(traced.jaxpr)


def count_scores(jaxpr):
    """Scores of products that contract the head width; loops counted, conds at their largest."""
    total = 0
    for equation in jaxpr.eqns:
        inner = [
            count_scores(getattr(sub, "jaxpr", sub))
            for value in equation.params.values()
            for sub in (value if isinstance(value, tuple) else (value,))
            if hasattr(sub, "eqns") or hasattr(sub, "jaxpr")
        ]
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            if [left[axis] for axis in contracted] == [K]:
                total += int(np.prod(equation.outvars[0].aval.shape)) // H
        elif equation.primitive.name == "cond":
            total += max(inner)
        elif equation.primitive.name == "scan":
            total += equation.params["length"] * sum(inner)
        else:
            total += sum(inner)
    return total


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_no_device_computes_what_blocks_hide(devices):
    """2n + 1 products of halves a device, of the 4n of the whole square; all devices alike."""
    tokens = 16 * devices
    got = score_products(mesh_of(sequence=devices), tokens, 8)
    half = 8 * 8
    assert got == (2 * devices + 1) * half


def test_ranks_on_a_mesh_equal_dense_and_a_ring_refuses_them():
    arrays, segments = inputs(4, 24)
    ranks = np.random.default_rng(1).integers(0, 5, segments.shape).astype(np.int32)

    @functools.partial(jax.jit, static_argnames="backend")
    def run(arrays, segments, ranks, backend="blockwise"):
        *qkv, cotangent = arrays
        places = SequenceLayout(jnp.arange(24), segments, 4, ranks_BS=ranks)
        out, pull = jax.vjp(lambda *qkv: attention(*qkv, places=places, backend=backend), *qkv)
        return out, *pull(cotangent)

    results = with_logical_axes(run, mesh_of(data=2, fsdp=2, tensor=2))(arrays, segments, ranks)
    wanted = run(arrays, segments, ranks, backend="dense")
    for got, want in zip(results, wanted, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5, rtol=0)
    with pytest.raises(UsageError, match=r"ranks of tokens cannot be sharded .* mesh.sequence=1"):
        with_logical_axes(run, mesh_of(sequence=2))(arrays, segments, ranks)
