"""Who exchanges how much with whom: collectives in HLO text, their groups, their mesh axes."""

import collections
import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np

from elastictok_jax.aot.hlo import Computation, Instruction

Groups = tuple[tuple[int, ...], ...]  # of partition numbers: places in mesh.devices.flat

COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange.

    Attributes:
      kind: one of KINDS.
      bytes: what each device holds of the larger side: gathered, to be reduced, or passed on.
      groups: devices that exchange among themselves; empty means all. For a permute, the rings.
    """

    kind: str
    bytes: float
    groups: Groups

    def group_size(self, devices: int) -> int:
        return max(map(len, self.groups), default=devices)

    def sent_bytes(self, devices: int) -> float:
        """Bytes that leave each device when a group of n passes shards around a ring: a gather or
        a scatter sends (n - 1) / n of the whole, a reduction twice that, a permute all of it."""
        if self.kind in ("collective-permute", "collective-broadcast"):
            return self.bytes
        size = self.group_size(devices)
        return (2 if self.kind == "all-reduce" else 1) * self.bytes * (size - 1) / size

    def axes(self, mesh: dict[str, int]) -> tuple[str, ...]:
        """Mesh axes along which the members of a group differ."""
        if not self.groups:
            return tuple(axis for axis, size in mesh.items() if size > 1)
        places = np.unravel_index(np.arange(math.prod(mesh.values())), tuple(mesh.values()))
        return tuple(
            axis
            for axis, place in zip(mesh, places, strict=True)
            if any(len(set(place[list(group)])) > 1 for group in self.groups)
        )

    def crosses(self, slice_of: Sequence[int]) -> bool:
        """Whether a group has members in several slices. `slice_of` is by partition number."""
        groups = self.groups or (tuple(range(len(slice_of))),)
        return any(len({slice_of[member] for member in group}) > 1 for group in groups)

    def together(self, slice_of: Sequence[int]) -> int:
        """The fewest members that a group has in a slice where it has any."""
        groups = self.groups or (tuple(range(len(slice_of))),)
        counts = (collections.Counter(slice_of[member] for member in group) for group in groups)
        return min(min(count.values()) for count in counts)


def collective_of(instruction: Instruction, computation: Computation) -> Collective | None:
    """The collective that an instruction is or starts; None for any other, and where it ends."""
    kind = instruction.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    # The TPU compiler writes reduce-scatter as a fusion: all-reduce, then this device's slice.
    root = computation.instructions[computation.root]
    if root.opcode == "dynamic-slice" and root.operands[0] == instruction.name:
        kind = "reduce-scatter"
    read = [shape for operand in instruction.operands for shape in computation.shapes(operand)]
    if kind == "collective-permute":
        size, groups = sum(shape.bytes for shape in read), _rings(instruction)
    else:
        if kind == "all-gather":
            # A start gives its operands, then its results.
            skipped = len(read) if instruction.opcode.endswith("-start") else 0
            size = sum(shape.bytes for shape in instruction.shapes[skipped:])
        else:
            size = sum(shape.bytes for shape in read)
        groups = replica_groups(instruction.attributes)
    return Collective(kind, size, groups)


def _rings(instruction: Instruction) -> Groups:
    """Devices that a permute joins into chains or rings."""
    found = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", instruction.attributes)
    pairs = re.findall(r"\{(\d+),(\d+)\}", found[1]) if found else []
    target = {int(a): int(b) for a, b in pairs}
    rings, left, reached = [], dict(target), set(target.values())
    # Chains start where nothing arrives; what remains are rings.
    for start in sorted(target, key=lambda device: device in reached):
        if start in left:
            ring = [start]
            while ring[-1] in left:
                ring.append(left.pop(ring[-1]))
            rings.append(tuple(dict.fromkeys(ring)))
    return tuple(rings)


def replica_groups(attributes: str) -> Groups:
    """Groups in any of the ways in which XLA writes them; empty means all devices.

    {{0,1},{2,3}} lists them; [2,2]<=[4] and [2,2]<=[2,2]T(1,0) cut a reordered count of devices
    into rows; mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'} names axes of a mesh of them.

    Raises:
      ValueError: if it is none of these.
    """
    found = re.search(r"\breplica_groups=(.*)", attributes)
    if not found:
        return ()
    text = found[1]
    listed = re.match(r"\{((?:\{[\d,]*\},?)*)\}", text)
    if listed:
        groups = re.findall(r"\{([\d,]*)\}", listed[1])
        return tuple(tuple(map(int, group.split(","))) for group in groups if group)
    counted = re.match(r"(\[[\d,]+\])<=(\[[\d,]+\](?:T\([\d,]+\))?)", text)
    if counted:
        return _rows(_count(counted[2]).reshape(_sizes(counted[1])))
    meshed = re.match(
        r"mesh\[(.*?)\](?:, device_ids=\((.*?\]?(?:T\([\d,]+\))?)\))? \{(.*?)\}", text
    )
    if meshed:
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", meshed[1])}
        order = _count(meshed[2]) if meshed[2] else np.arange(math.prod(axes.values()))
        return _mesh_groups(order.reshape(-1), axes, meshed[3])
    raise ValueError(f"replica groups of an unknown form: {text[:120]}")


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)))


def _count(text: str) -> np.ndarray:
    """[2,4]T(1,0): the numbers 0.. in that shape, transposed."""
    shape, _, order = text.partition("T")
    count = np.arange(math.prod(_sizes(shape))).reshape(_sizes(shape))
    return count.transpose(_sizes(order)) if order else count


def _rows(groups: np.ndarray) -> Groups:
    return tuple(map(tuple, groups.tolist()))


def _mesh_groups(order: np.ndarray, axes: dict[str, int], chosen: str) -> Groups:
    """Groups along `chosen` axes, each whole ('a') or a part of one ('a':(2)4: after a factor of
    2, the next 4)."""
    sizes: list[int] = []
    grouped: list[int] = []
    parts = {
        name: (int(before or 1), int(size or 0))
        for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", chosen)
    }
    for name, size in axes.items():
        before, part = parts.get(name, (1, 1))
        part = part or size
        if name in parts:
            grouped.append(len(sizes) + 1)
        sizes += [before, part, size // before // part]
    kept = [axis for axis in range(len(sizes)) if axis not in grouped]
    members = math.prod(sizes[axis] for axis in grouped)
    return _rows(order.reshape(sizes).transpose(kept + grouped).reshape(-1, members))
