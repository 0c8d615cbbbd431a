"""What the TPU compiler writes differently: stored pieces of its text."""

import pytest

from elastictok_jax.aot.collectives import Collective
from elastictok_jax.aot.costs import program_costs
from elastictok_jax.aot.hlo import Shape, parse_module, parse_shapes
from elastictok_jax.aot.kernels import KernelCall
from tests.aot import tpu_text


def costs_of(text):
    return program_costs(parse_module(text))


def test_layouts_and_memory_spaces():
    assert parse_shapes("f32[2,3]{1,0:T(8,128)S(1)}") == (Shape("f32", (2, 3), 1),)
    assert parse_shapes("(s32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}, /*index=2*/pred[5])") == (
        Shape("s32", ()),
        Shape("bf16", (4, 8)),
        Shape("pred", (5,)),
    )
    sizes = [shape.bytes for shape in parse_shapes("(f8e4m3fn[10], s4[10], c64[2], token[])")]
    assert sizes == [10, 5, 16, 0]


def test_text_that_is_no_program():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        parse_module("HloModule nothing\n")


def test_batch_axis_as_a_dilated_window():
    costs = costs_of(tpu_text.BATCHED_PRODUCT)
    assert costs.flops == 2 * 2 * 128 * 512 * 256
    # The keys lie in fast memory already: only queries are read, and scores written.
    assert costs.bytes == 2 * 2 * 128 * 256 + 4 * 2 * 128 * 512


@pytest.mark.parametrize(
    ("start", "stop", "direction", "trips"),
    [
        (0, 30, "LT", 10),
        (0, 31, "LT", 11),
        (3, 30, "LE", 10),
        (0, 30, "NE", 10),
        (9, 6, "LT", 0),
        (-6, 6, "LT", 4),
    ],
)
def test_trips_from_the_condition(start, stop, direction, trips):
    text = tpu_text.LOOP.replace("START", str(start)).replace("STOP", str(stop))
    costs = costs_of(text.replace("DIRECTION", direction))
    assert costs.flops == trips * 2 * 64**3
    assert costs.unknown_loops == ()


def test_a_loop_that_counts_the_other_way_is_not_guessed():
    text = tpu_text.LOOP.replace("START", "0").replace("STOP", "9").replace("DIRECTION", "GT")
    costs = costs_of(text)
    assert (costs.flops, costs.unknown_loops) == (2 * 64**3, ("while.1",))


def test_exchanges():
    counted = costs_of(tpu_text.EXCHANGES).collectives
    assert counted == {
        Collective("reduce-scatter", 2 * 256 * 2 * 128, ((0, 1), (2, 3))): 1,
        Collective("collective-permute", 2 * 8 * 128, ((0, 2), (1, 3))): 1,
        Collective("all-gather", 2 * 16 * 128, ((0, 2), (1, 3))): 1,
        Collective("all-reduce", 2 * 8 * 128, ((0, 1), (2, 3))): 1,
    }


def test_kernels_stated_known_and_unknown():
    costs = costs_of(tpu_text.KERNELS)
    attention = 2 * (2 * 2 * 512 * 1024 * 128)  # scores and mixing, of two heads
    assert costs.kernels == {
        KernelCall("splash_mha_fwd_residuals", attention, "shapes"): 1,
        KernelCall("mykern", 1234567.0, "stated", 777.0): 1,
        KernelCall("secret", None, "unknown"): 1,
    }
    assert costs.flops == attention + 1234567


@pytest.mark.parametrize(("name", "products"), [("dq", 3), ("dkv", 4), ("fused", 5)])
def test_backward_passes_of_splash_attention(name, products):
    text = tpu_text.KERNELS.replace("splash_mha_fwd", "splash_mha_" + name.replace("fused", "dkv"))
    if name == "fused":
        text = text.replace('bwd_kernel\\": false', 'bwd_kernel\\": true')
    (flops,) = [k.flops for k in costs_of(text).kernels if k.basis == "shapes"]
    assert flops == products * 2 * 2 * 512 * 1024 * 128
