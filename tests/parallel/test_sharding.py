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

def run(sizes, start):
    config = config_lib.default_config()
    config_lib.override(config, settings | {f"mesh.{axis}": n for axis, n in sizes.items()})
    config = config_lib.resolve(config)
    if sizes:
        mesh = make_mesh(config)
    else:
        mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), AXES)
    abstract = state_lib.abstract_state(config, mesh)
    state = state_lib.sharded_init(config, abstract) if start is None else jax.device_put(
        start, jax.tree.map(lambda leaf: leaf.sharding, abstract)
    )
    first = jax.device_get(state)
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
    return first, jax.device_get(state), report

start, reference, report = run({}, None)
reports = {"one": report}
moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), start.params, reference.params)
report["moved"] = min(jax.tree.leaves(moved))
report["shapes"] = {key: leaf.shape for key, leaf in flat(reference.params).items()}
for name, sizes in meshes.items():
    _, state, report = run(sizes, start)
    apart = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), state.params, reference.params)
    report["apart"] = flat(apart)
    reports[name] = report
print(json.dumps(reports))
"""


@pytest.fixture(scope="module")
def reports():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([SETTINGS, MESHES])],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_one_device_learns(reports):
    one = reports["one"]
    assert one["moved"] > 1e-5  # every weight moved, so that equal updates say something
    assert all(tuple(one["shards"][key]) == tuple(s) for key, s in one["shapes"].items())


@pytest.mark.parametrize("mesh", MESHES)
def test_numbers_are_those_of_one_device(reports, mesh):
    one, got = reports["one"], reports[mesh]
    assert got["metrics"].keys() == one["metrics"].keys()
    for key, value in one["metrics"].items():
        assert got["metrics"][key] == pytest.approx(value, rel=1e-5), key
    assert got["metrics"]["kept_fraction"] == one["metrics"]["kept_fraction"]
    assert got["lengths"] == one["lengths"]
    assert {key: gap for key, gap in got["apart"].items() if gap > 1e-5} == {}


@pytest.mark.parametrize("mesh", MESHES)
def test_each_device_holds_its_shard_alone(reports, mesh):
    sizes, got = {"fsdp": 1, "tensor": 1} | MESHES[mesh], reports[mesh]
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
