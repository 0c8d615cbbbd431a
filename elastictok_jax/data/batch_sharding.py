"""Says which blocks of a global batch a process reads, and puts them on its devices.

Dimension key: B rows, N blocks of a row, P inputs of a block, S inputs of a row (N x P), M blocks
of the part.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import NamedSharding

from elastictok_jax.models.base import Geometry


@dataclasses.dataclass(frozen=True)
class BatchPart:
    """The blocks of each global batch that a process reads, those of its devices.

    Attributes:
      needed_BN: bool, of each block of each row.
      counted_BN: bool, the ones among them whose damage this process counts; of all processes
        that read a block, exactly one counts it.
    """

    needed_BN: np.ndarray
    counted_BN: np.ndarray

    @functools.cached_property
    def places_BN(self) -> np.ndarray:
        """int64 indices of the needed blocks among all blocks, in row-major order."""
        return (np.cumsum(self.needed_BN) - 1).reshape(self.needed_BN.shape)

    @functools.cached_property
    def stretch(self) -> int:
        """The greatest length in blocks that divides all runs of needed blocks."""
        edges = np.diff(np.pad(self.needed_BN, [(0, 0), (1, 1)]).astype(np.int8), axis=1).ravel()
        runs = np.flatnonzero(edges < 0) - np.flatnonzero(edges > 0)
        return math.gcd(*runs.tolist())


def local_batch_part(
    sharding: NamedSharding,
    config: ml_collections.ConfigDict,
    geometry: Geometry,
    *,
    process: int | None = None,
) -> BatchPart:
    """Returns the blocks of a global batch of which the devices of a process hold any part.

    They need not form a rectangle, since the chips of a process are rarely neighbours in a mesh. Of
    the processes that hold a block, the first one counts its damage.

    Args:
      process: default this process.
    """
    process = jax.process_index() if process is None else process
    per_block = geometry.inputs
    shape = config.data.batch_size, geometry.row_inputs
    needed_BN = np.zeros((config.data.batch_size, config.data.sequence_blocks), bool)
    first_BN = np.full(needed_BN.shape, np.iinfo(np.int64).max)
    device: Any
    for device, index in sharding.devices_indices_map(shape).items():
        (top, bottom, _), (left, right, _) = (
            part.indices(size) for part, size in zip(index, shape, strict=True)
        )
        held = slice(top, bottom), slice(left // per_block, -(-right // per_block))
        needed_BN[held] |= device.process_index == process
        first_BN[held] = np.minimum(first_BN[held], device.process_index)
    return BatchPart(needed_BN, first_BN == process)


def batch_to_device(
    batch: Mapping[str, np.ndarray], *, part: BatchPart, sharding: NamedSharding, block_inputs: int
) -> dict[str, jax.Array]:
    """Puts a part of a batch on the devices: its patches and segment ids, as [B, S, ...] arrays.

    Args:
      batch: with the values of the blocks of `part` alone.
      block_inputs: inputs of a block.
    """
    rows, blocks = part.places_BN.shape
    shape = rows, blocks * block_inputs

    def place(values: np.ndarray) -> jax.Array:
        blocks_MP = values.reshape(-1, block_inputs, *values.shape[2:])

        def shard(index) -> np.ndarray:
            (top, bottom, _), (left, right, _) = (
                axis.indices(size) for axis, size in zip(index[:2], shape, strict=True)
            )
            first = left // block_inputs
            places = part.places_BN[top:bottom, first : -(-right // block_inputs)].ravel()
            low, high = int(places[0]), int(places[-1]) + 1
            # Adjacent blocks, the usual case, are not copied.
            held = blocks_MP[low:high] if high - low == len(places) else blocks_MP[places]
            inputs = held.reshape(bottom - top, -1, *values.shape[2:])
            return inputs[:, left - first * block_inputs : right - first * block_inputs]

        return jax.make_array_from_callback((*shape, *values.shape[2:]), sharding, shard)

    return {key: place(batch[key]) for key in ("patches", "segment_ids")}
