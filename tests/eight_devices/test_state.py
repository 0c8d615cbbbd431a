"""How the state and the batches lie on meshes of 8 devices, and how a saved state moves to another
mesh, another layout of layers, or the next stage."""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from elastictok_jax import masking
from elastictok_jax.config import apply_overrides, config_to_json, default_config, resolve_config
from elastictok_jax.data.batch_sharding import batch_to_device, local_batch_part
from elastictok_jax.data.sources.splits import open_splits
from elastictok_jax.errors import UsageError
from elastictok_jax.experiment_registry import get_experiment
from elastictok_jax.layers.scan_layout import stack_or_unstack
from elastictok_jax.parallel.sharding import (
    batch_sharding,
    replicated,
    replicated_arrays,
    sharding_notes,
)
from elastictok_jax.storage.checkpoint import Checkpointer
from elastictok_jax.training.initialise import initialise
from tests.tiny import abstract_state, codec_of, reader_of

SCRIPT = Path(__file__).parent.parent / "multiprocess" / "train_steps.py"
run = SimpleNamespace(**runpy.run_path(str(SCRIPT)))
TWO_LAYERS = {"model__encoder_layers": 2, "model__decoder_layers": 3}


def flat(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def started(sizes, **overrides):
    config = run.config_for(sizes, **overrides)
    mesh = run.mesh_for(config)
    return config, mesh, run.start(config, mesh)


@pytest.mark.parametrize(
    ("sizes", "fsdp", "tensor", "sequence"),
    [("8x1x1x1", 1, 1, 1), ("1x8x1x1", 8, 1, 1), ("1x2x2x2", 2, 2, 2), ("1x1x1x8", 1, 1, 8)],
)
def test_every_device_holds_its_shard_alone(sizes, fsdp, tensor, sequence):
    _, mesh, state = started(sizes)
    params = state.params["model"]
    got = {name: leaf.addressable_shards[0].data.shape for name, leaf in flat(params).items()}
    width = 32 // (fsdp * sequence)
    want = {
        "encoder/in_proj/kernel": (192, width),
        "encoder/kept_embed": (width,),
        "encoder/layers/attention/query/kernel": (1, width, 2 // tensor, 16),
        "encoder/layers/attention/out/kernel": (1, 2 // tensor, 16, width),
        "encoder/layers/mlp/up/kernel": (1, width, 32 // tensor),
        "decoder/layers/mlp/down/kernel": (1, 32 // tensor, width),
        "decoder/layers/mlp_norm/scale": (1, 32),
        "decoder/out_proj/kernel": (width, 192),
    }
    assert {name: got[name] for name in want} == want
    adam = state.opt_state["model"][1][0]
    for part in (state.ema_params["model"], adam.mu, adam.nu):
        assert {n: leaf.addressable_shards[0].data.shape for n, leaf in flat(part).items()} == got
    config = run.config_for(sizes)
    shard = run.batch_of(0, config, mesh)["patches"].addressable_shards[0].data.shape
    data = 8 if sizes == "8x1x1x1" else 1
    assert shard == (8 // (data * fsdp), 128 // sequence, 192)


def test_initial_weights_and_mask_lengths_are_those_of_one_device():
    _, _, one = started("1x1x1x1")
    config, mesh, state = started("1x2x2x2")
    for name, want in flat(one.params).items():
        np.testing.assert_allclose(flat(state.params)[name], want, atol=1e-6, rtol=0)
    draw = jax.jit(
        lambda rows: masking.draw_lengths(
            jax.random.key(5), rows, max_tokens=16, **config.masking.to_dict()
        )
    )
    rows = np.arange(64, dtype=np.int32).reshape(8, 8)
    cut = jax.device_put(rows, batch_sharding(mesh))
    np.testing.assert_array_equal(draw(cut), draw(jax.device_put(rows, jax.devices()[0])))


def test_what_stays_whole_is_named_with_its_size():
    config = run.config_for("1x2x1x4", model__width=512, model__heads=2)
    mesh = run.mesh_for(config)
    abstract = abstract_state(config, mesh)
    assert replicated_arrays(abstract) == [] and sharding_notes(abstract) == []
    small = replicated_arrays(abstract, above_mebibytes=0.001)
    assert {array.name for array in small} >= {"params/model/encoder/layers/mlp_norm/scale"}
    assert {array.shape for array in small} == {(1, 512), (512,)}

    large = jax.ShapeDtypeStruct((512, 1024), np.float32, sharding=replicated(mesh))
    also = replicated_arrays({"state": abstract, "table": large})
    assert also == [("table", (512, 1024), 2.0)]
    notes = sharding_notes({"state": abstract, "table": large})
    assert notes == ["replicated on each of 8 devices: table [512, 1024], 2.0 MiB"]


def test_a_width_that_fsdp_and_sequence_do_not_divide_together_is_noted_and_works():
    config = run.config_for("1x2x1x4", model__width=36, model__heads=2)
    mesh = run.mesh_for(config)
    abstract = abstract_state(config, mesh)
    assert abstract.params["model"]["encoder"]["in_proj"]["kernel"].sharding.spec == PartitionSpec(
        None, "fsdp"
    )
    (note,) = sharding_notes(abstract)
    assert note.startswith(
        "not sharded over mesh.sequence, since mesh.fsdp x mesh.sequence = 8 does not divide "
        "model.width: "
    )
    run.start(config, mesh)


def test_a_mesh_of_data_alone_says_that_the_state_is_whole():
    config = run.config_for("8x1x1x1")
    (note,) = sharding_notes(abstract_state(config, run.mesh_for(config)))
    assert note.startswith("each of 8 devices holds all of the state, ")
    config = run.config_for()
    assert sharding_notes(abstract_state(config, run.mesh_for(config))) == []


def test_the_pipeline_delivers_shards_that_are_no_whole_blocks():
    """Half a block a device, from the reader's whole blocks."""
    config = get_experiment("quickstart")
    values = {"video.resolution": 16, "masking.min_tokens": 1, "data.sequence_blocks": 4}
    apply_overrides(config, values | {"mesh.data": 1, "mesh.sequence": 8})
    config = resolve_config(config)
    mesh = run.mesh_for(config)
    sharding = batch_sharding(mesh)
    part = local_batch_part(sharding, config, codec_of(config).geometry)
    assert part.counted_BN.all() and part.needed_BN.shape == (2, 4)
    reader = reader_of(config, open_splits(config), split="train", part=part)
    batch = reader(0)
    placed = batch_to_device(
        batch, part=reader.part, sharding=sharding, block_inputs=reader.geometry.inputs
    )
    for key, value in placed.items():
        np.testing.assert_array_equal(value, batch[key])
        assert {shard.data.shape[1] for shard in value.addressable_shards} == {4}


@pytest.mark.parametrize(("saved", "restored"), [(True, False), (False, True)])
def test_a_state_saved_with_layers_stacked_restores_apart_and_back(saved, restored, tmp_path):
    """On another mesh at that, bit for bit: weights, moments, averages."""
    config, _, state = started("2x2x2x1", compute__scan_layers=saved, **TWO_LAYERS)
    state = jax.tree.map(  # no two numbers alike, in moments either
        lambda leaf: jax.device_put(
            np.random.default_rng(leaf.size).normal(size=leaf.shape).astype(leaf.dtype),
            leaf.sharding,
        ),
        state,
    )
    want = jax.device_get(state)
    checkpoints = Checkpointer(tmp_path, keep_last=1, keep_best=0)
    checkpoints.save(1, state, data_position={}, config=config, metrics=None)
    checkpoints.finish()
    config = run.config_for("1x2x2x2", compute__scan_layers=restored, **TWO_LAYERS)
    abstract = abstract_state(config, run.mesh_for(config))
    got, _ = checkpoints.restore(1, abstract)
    params = checkpoints.restore_params(1, "model", abstract.params["model"])
    checkpoints.close()
    assert jax.tree.structure(got) == jax.tree.structure(abstract)
    for leaf, wanted in zip(jax.tree.leaves(got), jax.tree.leaves(abstract), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
        assert (leaf.shape, leaf.dtype) == (wanted.shape, wanted.dtype)
    adam, want_adam = got.opt_state["model"][1][0], want.opt_state["model"][1][0]
    for tree, expected in (
        (got.params, want.params),
        (got.ema_params, want.ema_params),
        (adam.mu, want_adam.mu),
        (adam.nu, want_adam.nu),
        (params, want.ema_params["model"]),
    ):
        same = stack_or_unstack(jax.device_get(tree), stacked=saved)
        jax.tree.map(np.testing.assert_array_equal, same, expected)


def test_a_state_of_another_depth_is_refused_in_either_layout(tmp_path):
    config, _, state = started("2x2x2x1", **TWO_LAYERS)
    checkpoints = Checkpointer(tmp_path, keep_last=1, keep_best=0)
    checkpoints.save(1, state, data_position={}, config=config, metrics=None)
    checkpoints.finish()
    for stacked in (True, False):
        deeper = TWO_LAYERS | {"model__encoder_layers": 3, "compute__scan_layers": stacked}
        config = run.config_for("1x2x2x2", **deeper)
        with pytest.raises(UsageError) as caught:
            checkpoints.restore(1, abstract_state(config, run.mesh_for(config)))
        name = "params/model/encoder/layers/mlp/up/kernel"
        assert f"{name}: (2, 32, 32) saved, (3, 32, 32) asked for" in str(caught.value)
        assert "decoder" not in str(caught.value)
    checkpoints.close()


def test_next_stage_on_another_mesh(tmp_path):
    """Another mesh, layout and bottleneck: what fits is taken, and lies where it has to."""
    config, _, state = started("8x1x1x1", **TWO_LAYERS)
    want = jax.device_get(state.ema_params["model"])
    checkpoints = Checkpointer(tmp_path / "one", keep_last=1, keep_best=0)
    checkpoints.save(1, state, data_position={}, config=config, metrics=None)
    checkpoints.finish()
    checkpoints.close()
    (tmp_path / "one" / "config.json").write_text(config_to_json(config))
    config = run.config_for(
        "1x2x2x2",
        **TWO_LAYERS,
        seed=1,
        compute__scan_layers=False,
        model__bottleneck="vae",
        train__init_from=str(tmp_path / "one"),
        train__init_from_mismatch="reinitialise",
    )
    mesh = run.mesh_for(config)
    abstract, fresh = abstract_state(config, mesh), run.start(config, mesh)
    initial = jax.device_get(fresh.params["model"])
    state, lines = initialise(fresh, abstract, config=config, workdir=tmp_path)
    anew = {"encoder/out_proj/kernel": (32, 8), "decoder/in_proj/kernel": (4, 32)}
    assert len(lines) == 3 and all(name in "".join(lines) for name in anew)
    taken = flat(stack_or_unstack(want, stacked=False))
    for params in (state.params["model"], state.ema_params["model"]):
        for name, leaf in flat(params).items():
            expected = flat(initial)[name] if name in anew else taken[name]
            np.testing.assert_array_equal(leaf, expected)
            place = flat(abstract.params["model"])[name].sharding
            assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
    recorded = json.loads((tmp_path / "init_from.json").read_text())
    assert {n: tuple(v["model"]) for n, v in recorded["reinitialised"].items()} == anew


def test_default_config_is_fully_cut_on_a_mesh_with_sequence():
    """The paper's model: nothing above 1 MiB is left whole."""
    config = default_config()
    apply_overrides(config, {"mesh.data": 1, "mesh.fsdp": 2, "mesh.sequence": 4})
    config = resolve_config(config)
    assert replicated_arrays(abstract_state(config, run.mesh_for(config))) == []
