"""Lets processes agree, in every step, on whether to stop and on how much data was bad.

Each process puts its own numbers on its devices, the step adds them up, and the host reads the
sums when it reads the metrics, a few steps later. So all processes decide the same after the same
step, and no host waits for another.

Dimension key: D devices of the mesh, K kinds of votes.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

VOTES = ("stop", "replaced_blocks")


class Votes:
    """Casts this process's part of int32 [D, K] votes over all devices of `mesh`."""

    def __init__(self, mesh: Mesh):
        self._abstract = abstract_votes(mesh)
        places = [device.process_index for device in mesh.devices.flat]
        self._place = places.index(jax.process_index())  # only one device of a process votes
        self._last: tuple[tuple[int, ...], jax.Array] | None = None

    def cast(self, *, stop: bool, replaced_blocks: int) -> jax.Array:
        """Returns the votes for the next step, in a new array only if they have changed."""
        wishes = int(stop), replaced_blocks
        if self._last is None or self._last[0] != wishes:
            votes_DK = np.zeros(self._abstract.shape, np.int32)
            votes_DK[self._place] = wishes
            placed = jax.make_array_from_callback(
                votes_DK.shape, self._abstract.sharding, lambda index: votes_DK[index]
            )
            self._last = wishes, placed
        return self._last[1]


def abstract_votes(mesh: Mesh) -> jax.ShapeDtypeStruct:
    """Returns shape and sharding of what `Votes.cast` returns."""
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    return jax.ShapeDtypeStruct((mesh.size, len(VOTES)), np.int32, sharding=sharding)


def with_votes(step: Callable) -> Callable:
    """Wraps `step(state, batch, frozen)` to also take votes and return their sums as metrics."""

    @functools.wraps(step)
    def train_step(state, batch, frozen, votes_DK: jax.Array):
        state, metrics = step(state, batch, frozen)
        sums_K = jnp.sum(votes_DK, axis=0)
        return state, metrics | dict(zip(VOTES, sums_K, strict=True))

    return train_step
