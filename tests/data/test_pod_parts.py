"""What each host of a TPU pod reads, on described pods: plain objects with a chip's coordinates."""

import dataclasses
import itertools
import math

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from elastictok_jax.config import apply_overrides, resolve_config
from elastictok_jax.data.batch_sharding import local_batch_part
from elastictok_jax.data.media import MediaError
from elastictok_jax.data.sources.splits import open_splits
from elastictok_jax.experiment_registry import get_experiment
from elastictok_jax.parallel.sharding import batch_sharding
from tests.tiny import block_tokens, codec_of, mesh_of, reader_of


@dataclasses.dataclass(frozen=True)
class DescribedChip:
    id: int
    process_index: int
    coords: tuple[int, int, int]
    device_kind: str
    platform: str = "tpu"
    core_on_chip: int = 0
    slice_index: int = 0


def pod(kind: str, shape: tuple[int, int, int], host: tuple[int, int, int]) -> list[DescribedChip]:
    """The chips of a pod whose machines have `host` chips along each axis."""
    hosts = [side // part for side, part in zip(shape, host, strict=True)]

    def process(coords) -> int:
        x, y, z = (at // part for at, part in zip(coords, host, strict=True))
        return x + hosts[0] * (y + hosts[1] * z)

    places = [c[::-1] for c in itertools.product(*map(range, shape[::-1]))]
    return [DescribedChip(n, process(c), c, kind) for n, c in enumerate(places)]


PODS = {
    "v4:8x8x4": pod("TPU v4", (8, 8, 4), (2, 2, 1)),
    "v5p:8x8x4": pod("TPU v5", (8, 8, 4), (2, 2, 1)),
    "v5e:16x16, hosts of 4": pod("TPU v5 lite", (16, 16, 1), (2, 2, 1)),
    "v5e:16x16, hosts of 8": pod("TPU v5 lite", (16, 16, 1), (2, 4, 1)),
    "v6e:16x16": pod("TPU v6 lite", (16, 16, 1), (2, 2, 1)),
}
STAGES = {
    "elastictok_fsq": ("image", "video", "64k", "512k", "1m"),
    "elastictok_vae": ("image", "video", "64k", "512k"),
}


@pytest.mark.parametrize(
    "experiment", [f"{name}:stage={stage}" for name, stages in STAGES.items() for stage in stages]
)
@pytest.mark.parametrize("name", PODS)
def test_each_host_of_a_pod_reads_the_blocks_of_its_chips_and_no_other(name, experiment):
    devices, config = PODS[name], resolve_config(get_experiment(experiment))
    sharding, per_block = batch_sharding(mesh_of(config, devices)), block_tokens(config)
    shape = config.data.batch_size, config.data.sequence_blocks
    held = {device.process_index: set() for device in devices}
    tokens = shape[0], shape[1] * per_block
    for device, index in sharding.devices_indices_map(tokens).items():
        rows, columns = (range(*axis.indices(n)) for axis, n in zip(index, tokens, strict=True))
        blocks = {token // per_block for token in (*columns[::per_block], columns[-1])}
        held[device.process_index] |= set(itertools.product(rows, blocks))
    parts = [
        local_batch_part(sharding, config, codec_of(config).geometry, process=process)
        for process in sorted(held)
    ]
    for process, part in enumerate(parts):
        assert set(map(tuple, np.argwhere(part.needed_BN).tolist())) == held[process]
        assert not (part.counted_BN & ~part.needed_BN).any()
    counted_BN = np.sum([part.counted_BN for part in parts], axis=0)
    np.testing.assert_array_equal(counted_BN, np.ones(shape))
    blocks = [int(part.needed_BN.sum()) for part in parts]
    assert max(blocks) == math.ceil(math.prod(shape) / len(held))


def small(**options):
    config = get_experiment("quickstart")
    values = {"video.resolution": 16, "masking.min_tokens": 1, "data.packing_rows": 8}
    apply_overrides(
        config, values | {key.replace("__", "."): value for key, value in options.items()}
    )
    return resolve_config(config)


@pytest.mark.parametrize("scattered", [True, False])
@pytest.mark.parametrize(
    ("sizes", "blocks"),
    [((4, 1, 1, 1), 3), ((1, 1, 1, 4), 4), ((1, 1, 1, 4), 2), ((1, 1, 2, 2), 4)],
)
def test_parts_of_hosts_are_read_as_in_the_complete_batch_and_damage_once(sizes, blocks, scattered):
    """Two hosts of two chips, neighbours in the mesh or not; also half a block a chip."""
    axes = dict(zip(("data", "fsdp", "tensor", "sequence"), sizes, strict=True))
    config = small(
        data__batch_size=8,
        data__sequence_blocks=blocks,
        data__cache_mib=0,
        **{f"mesh__{axis}": size for axis, size in axes.items()},
    )
    feeds = open_splits(config)
    damaged = feeds.train[0].items[::2].tolist()
    for feed in feeds.train:
        read = feed.source.read

        def some_damaged(item, indices, *, side, read=read):
            if item in damaged:
                raise MediaError(f"item {item} is damaged")
            return read(item, indices, side=side)

        feed.source.read = some_damaged
    hosts = [0, 1, 0, 1] if scattered else [0, 0, 1, 1]
    devices = [DescribedChip(n, host, (n, 0, 0), "cpu", "cpu") for n, host in enumerate(hosts)]
    grid = np.array(devices).reshape(sizes)
    sharding = jax.NamedSharding(
        jax.sharding.Mesh(grid, tuple(axes)), PartitionSpec(("data", "fsdp"), "sequence")
    )
    complete = reader_of(config, feeds, split="train")
    replaced = 0
    for index in range(2):
        expected, faults = complete(index), []
        for process in (0, 1):
            part = local_batch_part(sharding, config, codec_of(config).geometry, process=process)
            reader = reader_of(config, feeds, split="train", part=part)
            batch = reader(index)
            faults += batch["faults"].splitlines()
            rows_P, blocks_P = np.nonzero(part.needed_BN)
            per_block = block_tokens(config)
            for key in ("patches", "segment_ids"):
                whole = expected[key].reshape(8, blocks, per_block, -1)
                found = batch[key].reshape(len(rows_P), per_block, -1)
                np.testing.assert_array_equal(found, whole[rows_P, blocks_P])
        assert sorted(faults) == sorted(expected["faults"].splitlines())
        replaced += len(faults)
    assert replaced
