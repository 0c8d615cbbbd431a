"""Costs of programs that this machine's compiler really compiled, against sums done by hand."""

import jax
import jax.numpy as jnp
import pytest

from elastictok_jax.aot.costs import program_costs
from elastictok_jax.aot.hlo import parse_module


def spec(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def costs_of(function, *shapes):
    return program_costs(parse_module(jax.jit(function).lower(*shapes).compile().as_text()))


def test_dot():
    costs = costs_of(jnp.matmul, spec(32, 64), spec(64, 128))
    assert costs.flops == costs.mean_flops == 2 * 32 * 64 * 128


@pytest.mark.parametrize(
    ("subscripts", "left", "right", "products"),
    [
        ("bij,bjk->bik", (3, 8, 16), (3, 16, 4), 3 * 8 * 16 * 4),
        ("bshk,bthk->bhst", (2, 8, 3, 16), (2, 5, 3, 16), 2 * 3 * 8 * 5 * 16),
        ("abij,jk->abik", (2, 3, 4, 5), (5, 6), 2 * 3 * 4 * 5 * 6),
    ],
)
def test_batched_and_several_contracted(subscripts, left, right, products):
    costs = costs_of(lambda x, y: jnp.einsum(subscripts, x, y), spec(*left), spec(*right))
    assert costs.flops == 2 * products


def convolve(*, stride=1, padding="VALID", spread=1, dilation=1, groups=1):
    def function(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            padding,
            lhs_dilation=(spread, spread),
            rhs_dilation=(dilation, dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    return function


def products_by_counting(side, size, *, stride=1, padding=(0, 0), spread=1, dilation=1):
    """Products on one axis: every output place and kernel place with an input under them."""
    wide = (side - 1) * spread + 1
    outputs = (wide + sum(padding) - (size - 1) * dilation - 1) // stride + 1
    count = 0
    for output in range(outputs):
        for place in range(size):
            at = output * stride + place * dilation - padding[0]
            count += 0 <= at < wide and at % spread == 0
    return count


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"padding": (1, 1)},
        {"padding": (2, 0), "stride": 2},
        {"padding": (1, 2), "dilation": 2},
        {"padding": (2, 2), "spread": 2},
        {"padding": (1, 3), "stride": 2, "spread": 3},
        {"padding": (3, 3), "stride": 2, "spread": 2, "dilation": 3},
    ],
)
def test_convolution_counts_no_padding_and_no_holes(settings):
    padding = [settings.get("padding", (0, 0))] * 2
    function = convolve(**settings | {"padding": padding})
    costs = costs_of(function, spec(2, 9, 9, 4), spec(3, 3, 4, 8))
    assert costs.flops == 2 * 2 * 4 * 8 * products_by_counting(9, 3, **settings) ** 2


def test_grouped_convolution():
    costs = costs_of(convolve(groups=2), spec(1, 5, 5, 4), spec(3, 3, 2, 6))
    assert costs.flops == 2 * 3 * 3 * (3 * 3) * 2 * 6


def stack(length):
    def function(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights, length=length)[0]

    return function


def test_a_loop_counts_its_trips_where_cost_analysis_counts_one():
    compiled = jax.jit(stack(11)).lower(spec(8, 64), spec(11, 64, 64)).compile()
    costs = program_costs(parse_module(compiled.as_text()))
    assert costs.flops == 11 * 2 * 8 * 64 * 64
    assert costs.unknown_loops == ()
    assert compiled.cost_analysis()["flops"] < costs.flops / 5


def test_nested_loops_multiply():
    def function(x, weights):
        outer = lambda x, _: (stack(7)(x, weights), None)  # noqa: E731
        return jax.lax.scan(outer, x, None, length=5)[0]

    costs = costs_of(function, spec(8, 32), spec(7, 32, 32))
    assert costs.flops == 5 * 7 * 2 * 8 * 32 * 32


def test_gradient_of_a_rematerialised_loop_is_four_forward_passes():
    step = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))

    def loss(weights, x):
        return jnp.sum(jax.lax.scan(step, x, weights)[0])

    costs = costs_of(jax.grad(loss), spec(6, 32, 32), spec(16, 32))
    assert costs.flops == 4 * 6 * 2 * 16 * 32 * 32


def test_a_loop_whose_trips_hang_on_data_counts_once_and_is_named():
    def function(x, limit):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < limit, lambda x: x @ x, x)

    costs = costs_of(function, spec(16, 16), spec())
    assert costs.flops == 2 * 16**3
    assert len(costs.unknown_loops) == 1


def test_of_a_conditional_the_dearest_branch_and_the_mean():
    def function(index, x, y):
        branches = [lambda x, y: x, lambda x, y: x @ y, lambda x, y: x @ y @ y]
        return jax.lax.switch(index, branches, x, y)

    costs = costs_of(function, spec(dtype=jnp.int32), spec(64, 64), spec(64, 64))
    assert costs.flops == 2 * (2 * 64**3)
    assert costs.mean_flops == 2 * 64**3


def test_bytes_of_a_product_are_its_operands_and_its_result():
    costs = costs_of(jnp.matmul, spec(256, 512), spec(512, 1024))
    assert costs.bytes == 4 * (256 * 512 + 512 * 1024 + 256 * 1024)


def test_a_loop_that_reads_a_slice_at_a_time_moves_the_whole_once():
    length, side = 50, 128
    weights = 4 * length * side * side
    costs = costs_of(stack(length), spec(1, side), spec(length, side, side))
    # Each slice is read, written as a slice, and read by the product.
    assert weights <= costs.bytes <= 3.2 * weights


def test_a_loop_that_writes_a_slice_at_a_time_moves_the_whole_once():
    def function(x):
        return jax.lax.scan(lambda x, _: (x + 1.0, jnp.sin(x)), x, None, length=64)[1]

    costs = costs_of(function, spec(4096))
    whole = 4 * 64 * 4096
    assert whole <= costs.bytes <= 8 * whole
