"""The verb from end to end with the TPU compiler, where it is installed: it needs no TPU."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, PartitionSpec

from elastictok_jax import cli
from elastictok_jax.aot.costs import program_costs
from elastictok_jax.aot.hlo import parse_module
from elastictok_jax.aot.topology import describe_topology
from elastictok_jax.hardware import PEAK_FLOPS

INSTALLED = importlib.util.find_spec("libtpu") is not None
needs_compiler = pytest.mark.skipif(
    not INSTALLED, reason="the TPU compiler is not installed: pip install 'jax[tpu]'"
)
TINY = (
    *("model.width=128", "model.mlp_width=128", "model.encoder_layers=2"),
    *("model.decoder_layers=2", "model.heads=1", "video.resolution=32"),
    *("masking.min_tokens=4", "data.batch_size=4", "data.sequence_blocks=2"),
    *("data.sources.main.path=/nowhere",),
)


def words(*overrides, topology="v4:2x2x1"):
    options = [f"--config.{override}" for override in (*TINY, *overrides)]
    return ["compile", "quickstart", "--topology", topology, "--json", *options]


@pytest.mark.skipif(INSTALLED, reason="the TPU compiler is installed")
def test_without_the_compiler_one_line_says_how_to_get_it(capsys):
    assert cli.main(words()) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert "the TPU compiler is not installed: pip install 'jax[tpu]'" in line
    assert captured.out == ""


@needs_compiler
def test_experiment_that_fits(capsys):
    # Sequences of two whole tiles of the attention kernel, which computes no less than a tile.
    assert cli.main(words("mesh.fsdp=2", "data.sequence_blocks=4")) == 0
    results = json.loads(capsys.readouterr().out)
    assert (results["chips"], results["devices"]) == (4, 4)
    assert results["mesh"] == {"data": 2, "fsdp": 2, "tensor": 1, "sequence": 1}
    for part in (results, results["encode"], results["decode"]):
        assert part["fits"] is True
        assert 0 < part["bytes_per_device"]["total"] < part["bytes_per_device"]["usable"]
        assert part["predicted"]["step_seconds"] > 0
    # Counted work is that of the method but for the gradient of the pixels and what is recomputed.
    assert 0.7 < results["flops_per_device"] / results["model_flops_per_device"] < 1.4
    # Weights are gathered over fsdp for each layer, and their gradients summed over data.
    axes = {(row["kind"], tuple(row["axes"])) for row in results["collectives"]}
    assert ("all-gather", ("fsdp",)) in axes
    assert any("data" in over for kind, over in axes if kind in ("all-reduce", "reduce-scatter"))
    assert not any("loops" in note for note in results["notes"])


@needs_compiler
def test_experiment_that_does_not_fit(capsys):
    overrides = ("data.batch_size=2097152", "model.mlp_width=512")
    assert cli.main(words(*overrides)) == 1
    results = json.loads(capsys.readouterr().out)
    assert results["fits"] is False and results["encode"]["fits"] is True
    assert results["bytes_per_device"]["total"] > results["bytes_per_device"]["usable"]
    assert "the compiler refused it" in results["notes"][0]


@needs_compiler
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (words("mesh.data=3"), "3 devices are requested and 4 are available"),
        (words("data.batch_size=6"), "nearest data.batch_size that fits is"),
        (words(topology="v4:3x5x1"), "unknown to the TPU compiler"),
        ([*words(), "--slices=0"], "--slices 0: must be 1 or more"),
    ],
)
def test_meshes_and_pods_that_do_not_fit(options, message, capsys):
    assert cli.main(options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@needs_compiler
@pytest.mark.parametrize(
    ("name", "slices", "devices"),
    [
        *(("v4:2x2x4", 1, 16), ("v5e:2x2", 2, 8), ("v5p:2x2x1", 1, 4)),
        *(("v6e:2x2", 1, 4), ("tpu7x:2x2x1", 1, 8)),
    ],
)
def test_devices_of_pods(name, slices, devices):
    topology = describe_topology(name, slices=slices)
    assert len(topology.devices) == devices
    assert {getattr(d, "slice_index", 0) for d in topology.devices} == set(range(slices))
    # A run on it would measure itself against the same peak.
    kind, chip = topology.devices[0].device_kind, topology.chip
    peak = next(peak for name, peak in PEAK_FLOPS.items() if kind.startswith(name))
    assert peak * chip.devices == chip.peak_flops


@needs_compiler
def test_splash_attention_is_seen_and_counted():
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    devices = describe_topology("v5e:2x2").devices
    mesh = Mesh(devices, ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([masks.FullMask((256, 512))] * 2), head_shards=1, q_seq_shards=1
    )
    spec = PartitionSpec("data")

    def attend(query, key):
        return jax.vmap(kernel)(query, key, key)

    mapped = jax.shard_map(
        attend, mesh=mesh, in_specs=(spec, spec), out_specs=spec, check_vma=False
    )
    query, key = (jax.ShapeDtypeStruct((4, 2, n, 128), jnp.bfloat16) for n in (256, 512))
    place = jax.sharding.NamedSharding(mesh, spec)
    jitted = jax.jit(mapped, in_shardings=place, out_shardings=place)
    costs = program_costs(parse_module(jitted.lower(query, key).compile().as_text()))
    ((found, count),) = costs.kernels.items()
    assert (found.name.startswith("splash_mha_fwd"), found.basis, count) == (True, "shapes", 1)
    assert costs.flops == 2 * 2 * 2 * 256 * 512 * 128
