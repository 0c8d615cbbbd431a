"""Exchanges of programs compiled for a mesh of eight devices: kinds, bytes, counts, axes."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from elastictok_jax.aot.costs import program_costs
from elastictok_jax.aot.hlo import parse_module

MESH = {"data": 2, "sequence": 4}
RING = [(i, (i + 1) % 4) for i in range(4)]


def exchanges(function, *, out_specs):
    """(kind, bytes, axes, group size) of each exchange and how often it runs, for x [16, 32]."""
    mesh = jax.make_mesh(tuple(MESH.values()), tuple(MESH), axis_types=(AxisType.Auto,) * 2)
    mapped = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=PartitionSpec("data", "sequence"),
        out_specs=out_specs,
        check_vma=False,
    )
    x = jax.ShapeDtypeStruct((16, 32), jnp.float32)
    costs = program_costs(parse_module(jax.jit(mapped).lower(x).compile().as_text()))
    return {
        (found.kind, found.bytes, found.axes(MESH), found.group_size(8)): count
        for found, count in costs.collectives.items()
    }


SHARD = 4 * 8 * 8  # bytes of [8, 8] float32


@pytest.mark.parametrize(
    ("function", "out_specs", "expected"),
    [
        (
            lambda x: jax.lax.psum(x, "sequence"),
            PartitionSpec("data"),
            ("all-reduce", SHARD, ("sequence",), 4),
        ),
        (
            lambda x: jax.lax.psum(x, ("data", "sequence")),
            PartitionSpec(),
            ("all-reduce", SHARD, ("data", "sequence"), 8),
        ),
        (
            lambda x: jax.lax.all_gather(x, "data"),
            PartitionSpec(None, None, "sequence"),
            ("all-gather", 2 * SHARD, ("data",), 2),
        ),
        (
            lambda x: jax.lax.psum_scatter(x, "sequence", scatter_dimension=0, tiled=True),
            PartitionSpec(("data", "sequence")),
            ("reduce-scatter", SHARD, ("sequence",), 4),
        ),
        (
            lambda x: jax.lax.ppermute(x, "sequence", RING),
            PartitionSpec("data", "sequence"),
            ("collective-permute", SHARD, ("sequence",), 4),
        ),
        (
            lambda x: jax.lax.all_to_all(x, "sequence", 0, 1, tiled=True),
            PartitionSpec("data", "sequence"),
            ("all-to-all", SHARD, ("sequence",), 4),
        ),
    ],
    ids=["psum", "psum of all", "all_gather", "psum_scatter", "ppermute", "all_to_all"],
)
def test_one_exchange(function, out_specs, expected):
    assert exchanges(function, out_specs=out_specs) == {expected: 1}


def test_exchanges_in_a_loop_run_at_every_trip():
    def ring(x):
        step = lambda x, _: (jnp.sin(jax.lax.ppermute(x, "sequence", RING)), None)  # noqa: E731
        return jax.lax.scan(step, x, None, length=4)[0]

    found = exchanges(ring, out_specs=PartitionSpec("data", "sequence"))
    assert found == {("collective-permute", SHARD, ("sequence",), 4): 4}


def test_exchanges_that_the_compiler_puts_in():
    mesh = jax.make_mesh(tuple(MESH.values()), tuple(MESH), axis_types=(AxisType.Auto,) * 2)
    place = partial(jax.sharding.NamedSharding, mesh)
    x = jax.ShapeDtypeStruct(
        (64, 32), jnp.float32, sharding=place(PartitionSpec("data", "sequence"))
    )
    w = jax.ShapeDtypeStruct((32, 16), jnp.float32, sharding=place(PartitionSpec("sequence")))
    jitted = jax.jit(jnp.matmul, out_shardings=place(PartitionSpec("data")))
    costs = program_costs(parse_module(jitted.lower(x, w).compile().as_text()))
    (found,) = costs.collectives
    assert (found.kind, found.axes(MESH)) == ("all-reduce", ("sequence",))
    assert found.bytes == 4 * 32 * 16  # each device's rows of the product
    assert costs.flops == 2 * 32 * 8 * 16  # rows over data, the sum over sequence
