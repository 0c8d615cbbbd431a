"""Parses collectives in HLO text: their bytes, device groups and mesh axes."""

import collections
import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np

from elastictok_jax.aot.hlo import Computation, Instruction

Groups = tuple[tuple[int, ...], ...]  # of partition numbers: indices into mesh.devices.flat

COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation.

    Attributes:
      kind: one of COLLECTIVES.
      bytes: per device, of the larger of input and output.
      groups: groups of devices that communicate; empty means all. For a permute, its rings.
    """

    kind: str
    bytes: float
    groups: Groups

    def group_size(self, devices: int) -> int:
        return max(map(len, self.groups), default=devices)

    def sent_bytes(self, devices: int) -> float:
        """Returns the bytes sent by each device when a group of n uses a ring algorithm.

        A gather or scatter sends (n - 1) / n of the full array, an all-reduce twice that, and a
        permute all of it.
        """
        if self.kind in ("collective-permute", "collective-broadcast"):
            return self.bytes
        size = self.group_size(devices)
        return (2 if self.kind == "all-reduce" else 1) * self.bytes * (size - 1) / size

    def axes(self, mesh: dict[str, int]) -> tuple[str, ...]:
        """Returns the mesh axes along which the members of a group differ."""
        if not self.groups:
            return tuple(axis for axis, size in mesh.items() if size > 1)
        places = np.unravel_index(np.arange(math.prod(mesh.values())), tuple(mesh.values()))
        return tuple(
            axis
            for axis, place in zip(mesh, places, strict=True)
            if any(len(set(place[list(group)])) > 1 for group in self.groups)
        )

    def crosses(self, slice_of: Sequence[int]) -> bool:
        """Returns whether a group spans several slices. `slice_of` is by partition number."""
        groups = self.groups or (tuple(range(len(slice_of))),)
        return any(len({slice_of[member] for member in group}) > 1 for group in groups)

    def together(self, slice_of: Sequence[int]) -> int:
        """Returns the smallest number of members of a group in any slice that it spans."""
        groups = self.groups or (tuple(range(len(slice_of))),)
        counts = (collections.Counter(slice_of[member] for member in group) for group in groups)
        return min(min(count.values()) for count in counts)


def collective_of(instruction: Instruction, computation: Computation) -> Collective | None:
    """Returns the collective that an instruction is or starts, or None (also for its -done)."""
    kind = instruction.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    # The TPU compiler emits reduce-scatter as a fusion: all-reduce, then this device's slice.
    root = computation.instructions[computation.root]
    if root.opcode == "dynamic-slice" and root.operands[0] == instruction.name:
        kind = "reduce-scatter"
    read = [shape for operand in instruction.operands for shape in computation.shapes(operand)]
    if kind == "collective-permute":
        size, groups = sum(shape.bytes for shape in read), _rings(instruction)
    else:
        if kind == "all-gather":
            # The result of a -start lists its operands, then its outputs.
            skipped = len(read) if instruction.opcode.endswith("-start") else 0
            size = sum(shape.bytes for shape in instruction.shapes[skipped:])
        else:
            size = sum(shape.bytes for shape in read)
        groups = replica_groups(instruction.attributes)
    return Collective(kind, size, groups)


def _rings(instruction: Instruction) -> Groups:
    """Returns the chains and rings into which a permute links devices."""
    found = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", instruction.attributes)
    pairs = re.findall(r"\{(\d+),(\d+)\}", found[1]) if found else []
    target = {int(a): int(b) for a, b in pairs}
    rings, left, reached = [], dict(target), set(target.values())
    # Chains start at devices that receive nothing; the rest are rings.
    for start in sorted(target, key=lambda device: device in reached):
        if start in left:
            ring = [start]
            while ring[-1] in left:
                ring.append(left.pop(ring[-1]))
            rings.append(tuple(dict.fromkeys(ring)))
    return tuple(rings)


def replica_groups(attributes: str) -> Groups:
    """Parses replica groups in any of XLA's notations; empty means all devices.

    {{0,1},{2,3}} is a list; [2,2]<=[4] and [2,2]<=[2,2]T(1,0) cut a permuted iota of devices into
    rows; mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'} names axes of a device mesh.

    Raises:
      ValueError: if the notation is unknown.
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
    """Evaluates [2,4]T(1,0): an iota in that shape, transposed."""
    shape, _, order = text.partition("T")
    count = np.arange(math.prod(_sizes(shape))).reshape(_sizes(shape))
    return count.transpose(_sizes(order)) if order else count


def _rows(groups: np.ndarray) -> Groups:
    return tuple(map(tuple, groups.tolist()))


def _mesh_groups(order: np.ndarray, axes: dict[str, int], chosen: str) -> Groups:
    """Returns groups along `chosen` axes.

    Each is a complete axis ('a') or a factor of one ('a':(2)4: the factor 4 after a factor 2).
    """
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
