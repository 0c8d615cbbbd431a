"""On a pod each host reads the blocks that its chips hold, and damage is counted once."""

import itertools
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from jax.experimental import mesh_utils

from elastictok_jax.config import override, resolve
from elastictok_jax.data.pipeline import BatchReader, LocalPart, local_part
from elastictok_jax.data.sources import open_feeds
from elastictok_jax.parallel.mesh import AXES
from elastictok_jax.registry import get_experiment

# kind, shape in chips, shape of a host in chips
TOPOLOGIES = {
    "v4:8x8x4": ("TPU v4", (8, 8, 4), (2, 2, 1)),
    "v4:4x4x4": ("TPU v4", (4, 4, 4), (2, 2, 1)),
    "v5p:8x8x4": ("TPU v5p", (8, 8, 4), (2, 2, 1)),
    "v5e:16x16": ("TPU v5 lite", (16, 16, 1), (2, 4, 1)),
    "v6e:16x16": ("TPU v6 lite", (16, 16, 1), (2, 2, 1)),
    "v6e:8x8": ("TPU v6 lite", (8, 8, 1), (2, 4, 1)),
}
# of data, fsdp, sequence and tensor, as parts of all chips; 0: what is left
MESHES = [(0, 1, 1, 1), (1, 0, 1, 1), (1, 1, 0, 1), (4, 0, 8, 1), (1, 0, 4, 2), (0, 2, 2, 2)]
BLOCKS = 64  # tokens of one each, so that any mesh cuts rows into whole blocks


def chips(kind, shape, host):
    """Devices as jax has them of a TPU: x first, a host a box of neighbors."""
    places = [place[::-1] for place in itertools.product(*map(range, shape[::-1]))]
    hosts = {}
    for place in places:
        box = tuple(at // edge for at, edge in zip(place, host, strict=True))
        hosts.setdefault(box[::-1], []).append(place)
    process = {place: n for n, box in enumerate(sorted(hosts)) for place in hosts[box]}
    return [
        SimpleNamespace(
            id=number,
            platform="tpu",
            device_kind=kind,
            coords=list(place),
            core_on_chip=0,
            process_index=process[place],
            slice_index=0,
        )
        for number, place in enumerate(places)
    ]


class Sharding:
    """What `local_part` asks of a NamedSharding over (data, fsdp) x sequence, whose devices jax
    wants to be real ones."""

    def __init__(self, devices_DFST):
        self.devices = devices_DFST

    def devices_indices_map(self, shape):
        sizes = dict(zip(AXES, self.devices.shape, strict=True))
        rows = shape[0] // (sizes["data"] * sizes["fsdp"])
        tokens = shape[1] // sizes["sequence"]
        found = []
        for place in itertools.product(*map(range, self.devices.shape)):
            at = dict(zip(AXES, place, strict=True))
            row = (at["data"] * sizes["fsdp"] + at["fsdp"]) * rows
            token = at["sequence"] * tokens
            index = slice(row, row + rows), slice(token, token + tokens)
            found.append((self.devices[place], index))
        return Found(found)


class Found(list):
    def items(self):
        return iter(self)


def config_of(rows):
    config = get_experiment("quickstart")
    override(
        config,
        {
            "video.resolution": 8,
            "video.frames_per_block": 2,
            "masking.min_tokens": 1,
            "data.sequence_blocks": BLOCKS,
            "data.batch_size": rows,
        },
    )
    return resolve(config)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_a_host_reads_exactly_what_its_chips_hold(topology, mesh):
    kind, shape, host = TOPOLOGIES[topology]
    devices = chips(kind, shape, host)
    sizes = [size or len(devices) // int(np.prod([s for s in mesh if s])) for size in mesh]
    by_axis = dict(zip(("data", "fsdp", "sequence", "tensor"), sizes, strict=True))
    if by_axis["sequence"] > BLOCKS:
        pytest.skip("a block would be cut")
    try:
        laid_out = mesh_utils.create_device_mesh([by_axis[axis] for axis in AXES], devices)
    except NotImplementedError:
        laid_out = mesh_utils.create_device_mesh(
            [by_axis[axis] for axis in AXES], devices, allow_split_physical_axes=True
        )
    rows = by_axis["data"] * by_axis["fsdp"]
    config, sharding = config_of(rows), Sharding(laid_out)
    held, counted = Counter(), Counter()
    for process in {device.process_index for device in devices}:
        part = local_part(sharding, config, process=process)
        pairs = {(row, block) for row, blocks in part.blocks.items() for block in blocks}
        own = [
            index
            for device, index in sharding.devices_indices_map((rows, BLOCKS)).items()
            if device.process_index == process
        ]
        needed = {
            pair
            for index in own
            for pair in itertools.product(*(range(axis.start, axis.stop) for axis in index))
        }
        assert pairs == needed
        assert len(pairs) <= np.prod(host) * max(1, BLOCKS // by_axis["sequence"])
        held.update(pairs)
        counted.update(part.counted)
        assert part.counted <= pairs
    assert set(held) == set(itertools.product(range(rows), range(BLOCKS)))
    assert set(counted.values()) == {1}
    assert counted.keys() == held.keys()


def test_a_part_with_gaps_is_that_of_the_whole_batch():
    config = config_of(4)
    feeds = open_feeds(config)
    whole = BatchReader(config, feeds, split="train")(3)
    blocks = {0: (0, 1, 9), 2: (5,), 3: (8, 9, 63)}
    counted = frozenset({(0, 0), (3, 8)})
    part = BatchReader(config, feeds, split="train", part=LocalPart(blocks, counted))(3)
    for place, (row, some) in enumerate(blocks.items()):
        for at, block in enumerate(some):
            for key in ("patches", "segment_ids"):
                np.testing.assert_array_equal(part[key][place, at], whole[key][row, block])
