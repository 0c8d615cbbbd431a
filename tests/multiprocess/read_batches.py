"""One process of several that read the global batches of a run; started by test_batches.py.

Writes this process's shards of the patches and segment ids of every batch. With --save-at, saves
the data position with a real checkpoint at that batch and stops; with --restore, goes on from it.
"""

import argparse
import json
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from elastictok_jax.config import apply_overrides, resolve_config
from elastictok_jax.data.batch_sharding import local_batch_part
from elastictok_jax.data.pipeline import DeviceBatches
from elastictok_jax.data.sources.splits import open_splits
from elastictok_jax.experiment_registry import get_experiment
from elastictok_jax.parallel.sharding import batch_sharding
from elastictok_jax.storage.checkpoint import Checkpointer
from elastictok_jax.training.state import TrainState
from tests.tiny import codec_of, mesh_of, reader_of

OVERRIDES = {
    "video.resolution": 16,
    "masking.min_tokens": 1,
    "data.batch_size": 4,
    "data.sequence_blocks": 4,
    "data.packing_rows": 32,
    "mesh.data": 2,
    "mesh.sequence": 2,
}


def config_for(workers: int):
    """Images, video and generated clips, mixed and packed, for a mesh of 4 devices."""
    config = get_experiment("mixture:stage=video")
    apply_overrides(config, OVERRIDES | {"data.workers": workers, "data.decode_threads": 2})
    return resolve_config(config)


def small_state(mesh) -> TrainState:
    whole = NamedSharding(mesh, PartitionSpec())
    zero = jax.make_array_from_callback((), whole, lambda _: np.zeros((), np.int32))
    weights = jax.make_array_from_callback((2,), whole, lambda _: np.zeros(2, np.float32))
    return TrainState(step=zero, params={"model": {"w": weights}}, opt_state={}, ema_params={})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--process", type=int, required=True)
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--batches", type=int, required=True)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--save-at", type=int)
    parser.add_argument("--restore", action="store_true")
    args = parser.parse_args()

    jax.config.update("jax_num_cpu_devices", 4 // args.processes)
    if args.processes > 1:
        address = f"localhost:{args.port}"
        jax.distributed.initialize(address, args.processes, args.process)
    config = config_for(args.workers)
    mesh = mesh_of(config)
    sharding = batch_sharding(mesh)
    part = local_batch_part(sharding, config, codec_of(config).geometry)
    feeds = open_splits(config)
    reader = reader_of(config, feeds, split="train", part=part)
    checkpoints = Checkpointer(args.workdir, keep_last=1, keep_best=0)
    start = 0
    if args.restore:
        start = checkpoints.latest_step()
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), small_state(mesh)
        )
        _, position = checkpoints.restore(start, abstract)
        assert position["files"] == feeds.fingerprint()
        reader = reader.from_row(position["next_row"])
    stop = args.batches if args.save_at is None else args.save_at
    batches = DeviceBatches(reader, sharding, start=0, stop=stop - start)
    shards = {}
    for index in range(start, stop):
        for key, value in next(batches).items():
            assert value.shape[0] == 4
            for shard in value.addressable_shards:
                corner = [
                    axis.indices(size)[0]
                    for axis, size in zip(shard.index, value.shape, strict=True)
                ]
                shards[json.dumps([index, key, corner])] = np.asarray(shard.data)
    batches.close()
    if args.save_at is not None:
        position = {"next_row": stop * config.data.batch_size, "files": feeds.fingerprint()}
        state = small_state(mesh)
        checkpoints.save(stop, state, data_position=position, config=config, metrics=None)
        checkpoints.finish()
    checkpoints.close()
    np.savez(args.output / f"{args.process}.npz", **shards)


if __name__ == "__main__":
    main()
