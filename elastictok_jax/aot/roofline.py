"""Roofline model: lower bounds on a program's time from its costs and the chip's peaks.

The terms are arithmetic, main memory, interconnect and network. With full overlap the time is the
longest term; with none it is their sum. A real step is in between, or slower if the matrix units
are poorly used.
"""

import collections
import dataclasses
from collections.abc import Sequence

from elastictok_jax.aot.collectives import Groups
from elastictok_jax.aot.costs import Costs
from elastictok_jax.hardware import Chip


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of one run.

    Attributes:
      compute: operations at the bf16 peak.
      memory: bytes of main memory at its bandwidth.
      interconnect: collectives within a slice. Each is assumed to use the two links of one torus
        axis, a permute one link, and not to overlap others, except for permutes around the same
        rings in opposite directions, since links are bidirectional.
      network: collectives between slices; None if there are any and the bandwidth is unknown.
    """

    compute: float
    memory: float
    interconnect: float
    network: float | None

    @property
    def terms(self) -> dict[str, float]:
        return {
            "compute": self.compute,
            "memory": self.memory,
            "interconnect": self.interconnect,
            "network": self.network or 0.0,
        }

    @property
    def seconds(self) -> float:
        """The time with full overlap."""
        return max(self.terms.values())

    @property
    def serial_seconds(self) -> float:
        """The time without overlap."""
        return sum(self.terms.values())

    @property
    def bound(self) -> str:
        """The name of the longest term."""
        return max(self.terms, key=self.terms.__getitem__)


def roofline(costs: Costs, *, chip: Chip, slice_of: Sequence[int]) -> Roofline:
    """Converts a program's costs to times on a device of `chip`.

    Args:
      slice_of: the slice of each device, in mesh order.
    """
    inside = across = 0.0
    link = chip.ici_bandwidth / chip.ici_links
    permutes: dict[Groups, float] = collections.defaultdict(float)
    for exchange, count in costs.collectives.items():
        sent = count * exchange.sent_bytes(len(slice_of))
        if exchange.crosses(slice_of) and exchange.kind == "collective-permute":
            across += sent
        elif exchange.crosses(slice_of):  # hierarchical: each member sends its part across
            across += sent / exchange.together(slice_of)
        elif exchange.kind == "collective-permute":
            permutes[exchange.groups] += sent / link
        else:
            inside += sent / (2 * link)
    while permutes:
        rings, seconds = permutes.popitem()
        other_way = tuple((ring[0], *ring[:0:-1]) for ring in rings)
        inside += max(seconds, permutes.pop(other_way, 0.0))
    network: float | None = 0.0
    if across:
        network = across / (chip.dcn_bandwidth / chip.devices) if chip.dcn_bandwidth else None
    return Roofline(
        compute=costs.flops * chip.devices / chip.peak_flops,
        memory=costs.bytes * chip.devices / chip.hbm_bandwidth,
        interconnect=inside,
        network=network,
    )
