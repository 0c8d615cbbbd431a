"""Training steps of a tiny model on any mesh: of the fake devices of one process
(tests/eight_devices), or of several, each running this file (test_meshes.py here).

A process writes the losses that it saw and how the devices lay, process 0 also AdamW's moments
after the first step. With --restore it goes on from the newest checkpoint in the workdir, with
--save it leaves one after its last step.
"""

import argparse
import json
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from elastictok_jax.config import apply_overrides, default_config, resolve_config
from elastictok_jax.parallel.distributed import wait_for_all_processes
from elastictok_jax.parallel.mesh import AXES
from elastictok_jax.parallel.sharding import batch_sharding, replicated, with_logical_axes
from elastictok_jax.storage.checkpoint import Checkpointer
from elastictok_jax.training.host_consensus import Votes
from tests.tiny import abstract_state, jit_train_step, mesh_of, sequence_tokens, sharded_init

SETTINGS = {
    "model.width": 32,
    "model.mlp_width": 32,
    "model.heads": 2,
    "model.encoder_layers": 1,
    "model.decoder_layers": 1,
    "model.patch": "1,8,8",
    "model.vae_dim": 4,
    "compute.dtype": "float32",
    "compute.remat": "none",
    "video.frames_per_block": 1,
    "video.resolution": 32,
    "masking.min_tokens": 3,
    "loss.lpips_weight": 0.0,
    "loss.kl_weight": 1e-4,
    "optimizer.learning_rate": 1e-3,
    "optimizer.warmup_steps": 5,
    "optimizer.schedule": "constant",
    "optimizer.clip_norm": 1e9,  # first moments are shares of the gradients themselves
    "optimizer.ema_decay": 0.9,
    "data.batch_size": 8,
    "data.sequence_blocks": 8,
}
STEPS, SAVED_AT = 30, 15
TOLERANCE = {"fsq": 1e-3, "vae": 1e-4}  # of losses, relative; rounding to codes is discontinuous


def config_for(sizes="1x1x1x1", **overrides):
    """The tiny run on a mesh of `sizes`, data x fsdp x tensor x sequence."""
    config = default_config()
    mesh = {f"mesh.{axis}": size for axis, size in zip(AXES, sizes.split("x"), strict=True)}
    values = {key.replace("__", "."): value for key, value in overrides.items()}
    apply_overrides(config, SETTINGS | mesh | values)
    return resolve_config(config)


def mesh_for(config):
    """All devices, or the first if that is what the mesh asks for."""
    one = all(config.mesh[axis] == 1 for axis in AXES)
    return mesh_of(config, jax.devices()[:1] if one else None)


def batch_of(step, config, mesh):
    """The batch of a step: noisy shades with clips of two blocks, and padding in one row."""
    rng = np.random.default_rng(step)
    tokens = sequence_tokens(config)
    shades = rng.integers(40, 216, (8, tokens, 1, 3))
    patches = np.clip(shades + rng.integers(-40, 40, (8, tokens, 64, 3)), 0, 255)
    segments = np.repeat(np.arange(1, 5, dtype=np.int32)[None], 8, axis=0).repeat(tokens // 4, 1)
    segments[3, tokens // 2 :] = 0
    arrays = {
        "patches": patches.reshape(8, tokens, 192).astype(np.uint8),
        "segment_ids": segments,
    }
    return {
        key: jax.make_array_from_callback(
            value.shape, batch_sharding(mesh), lambda index, value=value: value[index]
        )
        for key, value in arrays.items()
    }


def start(config, mesh):
    """The state at step 0."""
    return sharded_init(config, abstract_state(config, mesh))


def jitted_step(config, mesh):
    """The step that the loop runs."""
    return with_logical_axes(jit_train_step(config, abstract_state(config, mesh)), mesh)


def train(step, state, *, config, mesh, steps):
    """The state after `steps` of a jitted step from `state`, which is donated, and the losses."""
    losses = []
    votes = Votes(mesh).cast(stop=False, replaced_blocks=0)
    for index in steps:
        state, metrics = step(state, batch_of(index, config, mesh), {}, votes)
        losses.append(metrics["loss"])
    return state, [float(loss) for loss in losses]


def moments_of(state):
    """AdamW's first moments."""
    return next(part.mu for part in state.opt_state["model"][1] if hasattr(part, "mu"))


def assert_close_norms(got, want, *, rtol, what):
    """Every array of two trees differs by at most `rtol` of the norm of the wanted one."""
    leaves = jax.tree_util.tree_leaves_with_path(want)
    for (path, expected), value in zip(leaves, jax.tree.leaves(got), strict=True):
        norm = np.linalg.norm(expected)
        assert norm > 0, path
        apart = np.linalg.norm(value - expected) / norm
        assert apart <= rtol, (what, jax.tree_util.keystr(path), apart)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--process", type=int, required=True)
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--mesh", required=True)
    parser.add_argument("--overrides", type=json.loads, default={})
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--restore", action="store_true")
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()

    jax.config.update("jax_num_cpu_devices", 8 // args.processes)
    jax.config.update("jax_disable_most_optimizations", True)  # they cost compile time
    if args.processes > 1:
        jax.distributed.initialize(f"localhost:{args.port}", args.processes, args.process)
    config = config_for(args.mesh, **args.overrides)
    mesh = mesh_for(config)
    wait_for_all_processes(
        mesh, timeout=500
    )  # as the loop does: on a busy machine some start much later
    checkpoints = Checkpointer(args.workdir, keep_last=1, keep_best=0)
    first = 0
    if args.restore:
        first = checkpoints.latest_step()
        state, _ = checkpoints.restore(first, abstract_state(config, mesh))
    else:
        state = start(config, mesh)
    step, steps = jitted_step(config, mesh), range(first, args.steps)
    state, losses = train(step, state, config=config, mesh=mesh, steps=steps[:1])
    if list(steps[:1]) == [0]:
        whole = jax.jit(lambda tree: tree, out_shardings=replicated(mesh))(moments_of(state))
        if args.process == 0:
            np.savez(args.output / "moments.npz", **flatten_dict(jax.device_get(whole), sep="/"))
    state, more = train(step, state, config=config, mesh=mesh, steps=steps[1:])
    losses += more
    if args.save:
        checkpoints.save(args.steps, state, data_position={}, config=config, metrics=None)
        checkpoints.finish()
    checkpoints.close()
    report = {
        "losses": losses,
        "mesh": list(mesh.devices.shape),
        "processes": [device.process_index for device in mesh.devices.flat],  # in its order
    }
    (args.output / f"{args.process}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
