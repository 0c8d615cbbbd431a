"""How long a program would take at best: its costs over what the chip can do.

Three terms: arithmetic, main memory, interconnect. If they overlap fully the longest is the time;
if nothing overlaps their sum is. A real step lies between, or above where matrix units starve.
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
      interconnect: exchanges within a slice. Each is taken to use the two links of one axis of the
        torus, a permute one link, and none to overlap another but permutes that go round the same
        rings the other way, since a link carries both ways at once.
      network: exchanges between slices; None if there are some and their bandwidth is not known.
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
        """With all terms overlapped."""
        return max(self.terms.values())

    @property
    def serial_seconds(self) -> float:
        """With nothing overlapped."""
        return sum(self.terms.values())

    @property
    def bound(self) -> str:
        """The longest term."""
        return max(self.terms, key=self.terms.__getitem__)


def roofline(costs: Costs, *, chip: Chip, slice_of: Sequence[int]) -> Roofline:
    """The times of a program's costs on a device of `chip`.

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
        elif exchange.crosses(slice_of):  # within slices first: each member takes its part across
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
