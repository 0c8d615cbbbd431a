"""Programs of an experiment and their figures, compiled for the CPU at hand."""

import json
import math

import jax
import jax.numpy as jnp
import pytest

from elastictok_jax import cli
from elastictok_jax.aot.costs import Costs, program_costs
from elastictok_jax.aot.hlo import parse_module
from elastictok_jax.aot.programs import programs
from elastictok_jax.aot.report import (
    compile_notes,
    memory_sizes,
    program_report,
    report_compile_refusal,
    report_text,
)
from elastictok_jax.aot.roofline import roofline
from elastictok_jax.config import apply_overrides, resolve_config
from elastictok_jax.experiment_registry import get_experiment
from elastictok_jax.hardware import CHIPS, GIB
from tests.tiny import mesh_of

pytestmark = pytest.mark.xdist_group("aot_report")  # one worker makes what they share

TINY = {
    "model.width": 16,
    "model.mlp_width": 32,
    "model.encoder_layers": 3,
    "model.decoder_layers": 1,
    "model.heads": 2,
    "video.resolution": 16,
    "masking.min_tokens": 1,
    "data.batch_size": 2 * jax.device_count(),
    "data.sequence_blocks": 1,
}
TOKENS = 2 * 2 * 2  # (4 / 2 frames) (16 / 8) (16 / 8)


def tiny(**settings):
    config = get_experiment("quickstart")
    apply_overrides(
        config, TINY | {key.replace("__", "."): value for key, value in settings.items()}
    )
    return resolve_config(config)


def compiled_programs(config):
    mesh = mesh_of(config)
    return mesh, {p.name: (p, p.lower().compile()) for p in programs(config, mesh)}


@pytest.fixture(scope="module")
def figures():
    mesh, found = compiled_programs(tiny())
    chip = CHIPS["v5e"]
    return {
        name: program_report(compiled, mesh=mesh, chip=chip, model_flops=program.model_flops)
        for name, (program, compiled) in found.items()
    }


def test_encode_and_decode_do_what_the_method_needs_and_no_more(figures):
    for half, layers in (("encode", 3), ("decode", 1)):
        linear = 4 * 16 * 16 + 3 * 16 * 32
        ends = 16 * 384 + 16 * 6  # patches of 2 x 8 x 8 x 3 values, six FSQ levels
        attention = 2 * TOKENS * 16  # scores and mixing with every token of the one block
        flops = 2 * TOKENS * (layers * (linear + attention) + ends)
        assert figures[half]["model_flops_per_device"] == flops
        assert figures[half]["flops_per_device"] == flops


def test_training_is_three_times_that_less_the_gradient_of_the_pixels(figures):
    step = figures["train_step"]
    forward = sum(figures[half]["flops_per_device"] for half in ("encode", "decode"))
    rows = 2  # of each device's batch
    assert step["model_flops_per_device"] == 3 * rows * forward
    pixels = 2 * rows * TOKENS * 384 * 16
    # XLA may write the squared error as a product too.
    assert step["flops_per_device"] == pytest.approx(3 * rows * forward - pixels, rel=0.01)


def test_memory_of_the_step_is_its_state_and_its_batch(figures):
    sizes = figures["train_step"]["bytes_per_device"]
    config = tiny()
    program, *_ = programs(config, mesh_of(config))
    (state, batch, _, votes), _ = program.lower().args_info
    assert all(leaf.donated for leaf in jax.tree.leaves(state))
    assert not any(leaf.donated for leaf in jax.tree.leaves(batch))

    def size(tree):
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))

    assert sizes["aliased"] >= size(state)  # all of it is donated
    assert sizes["arguments"] == size(state) + size((batch, votes)) / jax.device_count()
    assert sizes["usable"] == 15.75 * GIB and sizes["capacity"] == 16 * GIB
    assert figures["train_step"]["fits"] is True


def test_memory_of_a_known_program():
    x = jax.ShapeDtypeStruct((1000, 250), jnp.float32)
    kept = memory_sizes(jax.jit(lambda x: x + 1).lower(x).compile())
    assert (kept["arguments"], kept["outputs"], kept["aliased"]) == (10**6, 10**6, 0)
    assert kept["total"] == 2 * 10**6 + kept["temporaries"] + kept["generated_code"]
    donated = memory_sizes(jax.jit(lambda x: x + 1, donate_argnums=0).lower(x).compile())
    assert donated["aliased"] == 10**6
    assert donated["total"] == kept["total"] - 10**6


def test_more_than_a_chip_holds_does_not_fit():
    big = jax.ShapeDtypeStruct((5 * 2**30,), jnp.float32)
    compiled = jax.jit(lambda x: x[0]).lower(big).compile()
    mesh = mesh_of(tiny())
    found = {
        name: program_report(compiled, mesh=mesh, chip=CHIPS[name], model_flops=1.0)["fits"]
        for name in ("v5e", "v4")
    }
    assert found == {"v5e": False, "v4": True}


def test_predictions_are_those_of_the_roofline():
    chip = CHIPS["v4"]
    x = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    compiled = jax.jit(jnp.matmul).lower(x, x).compile()
    mesh = mesh_of(tiny())
    found = program_report(compiled, mesh=mesh, chip=chip, model_flops=mesh.size * 512.0**3)
    guess = found["predicted"]
    flops, moved = 2 * 512**3, 3 * 4 * 512**2
    assert guess["compute_seconds"] == pytest.approx(flops / 275e12)
    assert guess["memory_seconds"] == pytest.approx(moved / 1200e9)
    assert (guess["bound"], guess["step_seconds"]) == ("memory", guess["memory_seconds"])
    assert guess["hardware_flops_utilisation"] == pytest.approx(
        guess["compute_seconds"] / guess["memory_seconds"]
    )
    assert guess["model_flops_utilisation"] == guess["hardware_flops_utilisation"] / 2
    assert found["arithmetic_intensity"] == flops / moved


@pytest.mark.parametrize(
    ("message", "total"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (33.54G) exceeds available HBM (30.75G).",
            33.54 * GIB,
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory. Used 40.00G of 15.75G hbm.", 40 * GIB),
        ("RESOURCE_EXHAUSTED: no figures", None),
    ],
)
def test_a_program_that_the_compiler_refuses(message, total):
    found = report_compile_refusal(message + "\n\nallocations", CHIPS["v4"])
    assert found["fits"] is False
    assert found["bytes_per_device"] == {"total": total, "usable": 30.75 * GIB}
    assert message in found["notes"][0]


def test_notes_say_what_is_left_out():
    costs = Costs(flops=2.0, mean_flops=1.0, unknown_loops=("while.3",))
    line = roofline(costs, chip=CHIPS["v4"], slice_of=[0])
    text = " ".join(compile_notes(costs, network_known=line.network is not None))
    assert "most expensive branch" in text and "while.3" in text and "slices" not in text
    assert "between slices" in " ".join(compile_notes(Costs(), network_known=False))
    assert compile_notes(Costs(), network_known=True) == []


def test_loops_of_the_real_step_are_all_known():
    config = tiny(optimizer__accumulate_steps=2, compute__remat="full")
    _, found = compiled_programs(config)
    _, compiled = found["train_step"]
    assert " while(" in compiled.as_text()
    assert program_costs(parse_module(compiled.as_text())).unknown_loops == ()


def test_table_for_people(figures):
    results = {
        "experiment": "mine",
        "topology": "v5e:2x2",
        "slices": 2,
        "chips": 8,
        "devices": 8,
        "mesh": {"data": 8, "fsdp": 1},
        **figures["train_step"],
        "predicted_tokens_per_second": 1234567.0,
        "encode": figures["encode"] | {"predicted_tokens_per_second": 1.0},
        "decode": report_compile_refusal("RESOURCE_EXHAUSTED: (33.54G) exceeds", CHIPS["v5e"]),
    }
    json.dumps(results)
    text = report_text(results)
    assert text.startswith("mine on v5e:2x2 x 2 slices: 8 chips, 8 devices, mesh data=8\n")
    assert "train_step: fits" in text and "1,234,567 tokens/s" in text
    assert "decode: DOES NOT FIT\n  memory a device   33.54 GiB of 15.75 GiB usable" in text


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v4", "write CHIP:SHAPE in chips, e.g. v4:8x8x4"),
        ("v4:8*8", "write CHIP:SHAPE in chips"),
        ("v99:2x2", "choose a chip of v4, v5e, v5p, v6e, tpu7x"),
    ],
)
def test_bad_topologies(topology, message, capsys):
    assert cli.main(["compile", "quickstart", "--topology", topology]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"elastictok: error: --topology {topology}: ") and message in line
