"""What processes tell each other with every step: whether to stop, and data that was bad.

Each process lays its own numbers on its devices, the step adds them up, and the host reads the
sums when it reads the metrics, steps later. So all decide the same after the same step, and no
host waits for another.

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
    """This process's part of int32 [D, K] arrays over all devices of `mesh`."""

    def __init__(self, mesh: Mesh):
        self._abstract = abstract_votes(mesh)
        places = [device.process_index for device in mesh.devices.flat]
        self._place = places.index(jax.process_index())  # one device of several votes
        self._last: tuple[tuple[int, ...], jax.Array] | None = None

    def cast(self, *, stop: bool, replaced_blocks: int) -> jax.Array:
        """The votes for the next step; made anew only when they change."""
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
    """Shape and sharding of what `Votes.cast` returns."""
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    return jax.ShapeDtypeStruct((mesh.size, len(VOTES)), np.int32, sharding=sharding)


def with_votes(step: Callable) -> Callable:
    """`step(state, batch, frozen)` that also takes votes, their sums among its metrics."""

    @functools.wraps(step)
    def train_step(state, batch, frozen, votes_DK: jax.Array):
        state, metrics = step(state, batch, frozen)
        sums_K = jnp.sum(votes_DK, axis=0)
        return state, metrics | dict(zip(VOTES, sums_K, strict=True))

    return train_step
