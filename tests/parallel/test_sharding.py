"""A training step on any mesh of 8 devices is the step of one device.

The devices are CPU stand-ins of one subprocess: their number is fixed before jax starts.
"""

import json
import subprocess
import sys

import pytest

MESHES = {
    "data": {"data": 8},
    "data+fsdp": {"data": 4, "fsdp": 2},
    "more fsdp": {"data": 2, "fsdp": 4},
    "data+fsdp+tensor": {"data": 2, "fsdp": 2, "tensor": 2},
}
SETTINGS = {
    "model.width": 16,
    "model.mlp_width": 24,
    "model.heads": 2,
    "model.encoder_layers": 1,
    "model.decoder_layers": 1,
    "model.patch": "1,8,8",
    "model.dtype": "float32",
    "model.remat": "none",
    "model.bottleneck": "vae",  # its noise must not depend on the mesh either
    "video.frames_per_block": 1,
    "video.resolution": 32,
    "masking.min_tokens": 3,
    "loss.lpips_weight": 0.0,
    "loss.kl_weight": 1e-3,
    "optimizer.learning_rate": 1e-3,
    "optimizer.warmup_steps": 0,
    "data.batch_size": 8,
    "data.sequence_blocks": 2,
}
PROGRAM = """
import json, sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)  # they only cost compile time here
import numpy as np
from jax.sharding import Mesh
from flax import traverse_util
from elastictok_jax import config as config_lib
from elastictok_jax import masking
from elastictok_jax.parallel.mesh import AXES, make_mesh
from elastictok_jax.parallel.sharding import batch_sharding, in_mesh
from elastictok_jax.training import state as state_lib
from elastictok_jax.training.step import make_train_step

settings, meshes = json.loads(sys.argv[1])
rng = np.random.default_rng(0)
segments = np.ones((8, 32), np.int32)
segments[:, 16:] = rng.integers(0, 3, (8, 1))
patches = rng.integers(0, 256, (8, 32, 192), dtype=np.uint8)

def flat(tree):
    return {"/".join(key): leaf for key, leaf in traverse_util.flatten_dict(tree).items()}

def abstract_on(sizes):
    config = config_lib.default_config()
    config_lib.override(config, settings | {f"mesh.{axis}": n for axis, n in sizes.items()})
    config = config_lib.resolve(config)
    if sizes:
        mesh = make_mesh(config)
    else:
        mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), AXES)
    return config, mesh, state_lib.abstract_state(config, mesh)

def init(sizes):
    config, _, abstract = abstract_on(sizes)
    return jax.device_get(state_lib.sharded_init(config, abstract))

def run(sizes, start):
    config, mesh, abstract = abstract_on(sizes)
    state = jax.device_put(start, jax.tree.map(lambda leaf: leaf.sharding, abstract))
    batch = {"patches": patches, "segment_ids": segments}
    batch = jax.device_put(batch, batch_sharding(mesh))
    draw = jax.jit(lambda rows: masking.draw_lengths(
        jax.random.key(5), rows, max_tokens=16, **config.masking.to_dict()))
    rows = jax.device_put(np.arange(16, dtype=np.int32).reshape(8, 2), batch_sharding(mesh))
    lengths = draw(rows)
    step = in_mesh(jax.jit(make_train_step(config), donate_argnums=0), mesh)
    state, metrics = step(state, batch, {})
    wanted = flat(jax.tree.map(lambda leaf: leaf.sharding, abstract.params))
    params = flat(state.params)
    moments = flat(next(s.mu for s in jax.tree.leaves(
        state.opt_state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu")))
    report = {
        "metrics": {key: float(value) for key, value in metrics.items()},
        "lengths": np.asarray(lengths).tolist(),
        "batch_shard": batch["patches"].addressable_shards[0].data.shape,
        "shards": {key: leaf.addressable_shards[0].data.shape for key, leaf in params.items()},
        "moment_shards": {
            key: leaf.addressable_shards[0].data.shape for key, leaf in moments.items()
        },
        "stays": all(leaf.sharding.is_equivalent_to(wanted[key], leaf.ndim)
                     for key, leaf in params.items()),
    }
    return jax.device_get(state), report

start = init({})
reference, report = run({}, start)
reports = {"one": report}
moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), start.params, reference.params)
report["moved"] = min(jax.tree.leaves(moved))
report["shapes"] = {key: leaf.shape for key, leaf in flat(reference.params).items()}
for name, sizes in meshes.items():
    state, report = run(sizes, start)
    apart = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), state.params, reference.params)
    report["apart"] = flat(apart)
    reports[name] = report
fresh = init(meshes["data+fsdp+tensor"])
same = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), fresh.params, start.params)
reports["init_apart"] = max(jax.tree.leaves(same))
print(json.dumps(reports))
"""


def reports_of_all_meshes():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([SETTINGS, MESHES])],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def check_numbers(one, got):
    """Metrics, mask lengths and updated weights are those of one device."""
    assert got["metrics"] == pytest.approx(one["metrics"], rel=1e-5)
    assert got["metrics"]["kept_fraction"] == one["metrics"]["kept_fraction"]
    assert got["lengths"] == one["lengths"]
    assert {key: gap for key, gap in got["apart"].items() if gap > 1e-5} == {}


def check_shards(sizes, got):
    """Every device holds its shard alone, before and after the step."""
    sizes = {"fsdp": 1, "tensor": 1} | sizes
    fsdp, tensor = sizes["fsdp"], sizes["tensor"]
    assert got["batch_shard"] == [8 // (sizes["data"] * fsdp), 32, 192]
    want = {
        "encoder/in_proj/kernel": [192, 16 // fsdp],
        "encoder/kept_embed": [16 // fsdp],
        "encoder/layers/attention/query/kernel": [1, 16 // fsdp, 2 // tensor, 8],
        "encoder/layers/attention/out/kernel": [1, 2 // tensor, 8, 16 // fsdp],
        "encoder/layers/mlp/up/kernel": [1, 16 // fsdp, 24 // tensor],
        "decoder/layers/mlp/down/kernel": [1, 24 // tensor, 16 // fsdp],
        "decoder/layers/mlp_norm/scale": [1, 16],
        "decoder/out_proj/kernel": [16 // fsdp, 192],
    }
    assert {key: got["shards"][key] for key in want} == want
    assert got["moment_shards"] == got["shards"]  # of Adam
    assert got["stays"]  # the step returns what it was given


def test_a_step_on_any_mesh_is_the_step_of_one_device():
    """One test, so that parallel workers do not each compile six programs."""
    reports = reports_of_all_meshes()
    one = reports["one"]
    assert one["moved"] > 1e-5  # every weight moved, so that equal updates say something
    assert one["shards"] == one["shapes"]
    assert reports["init_apart"] <= 1e-6
    for mesh, sizes in MESHES.items():
        print("mesh", mesh)  # shown when what follows fails
        check_numbers(one, reports[mesh])
        check_shards(sizes, reports[mesh])
