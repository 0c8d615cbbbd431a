"""Counts the operations, bytes, collectives and kernels of a program on one device.

Unlike XLA's `cost_analysis()`, which counts the body of a loop once, everything is multiplied by
the trip counts of the enclosing loops.
"""

import dataclasses
import math
import re
from collections import Counter

from elastictok_jax.aot.collectives import Collective, collective_of
from elastictok_jax.aot.hlo import Computation, Instruction, Module, Shape, trip_count
from elastictok_jax.aot.kernels import MARKS, KernelCall, kernel_call_target, kernel_of

# Instructions that move no data themselves.
_STILL = {
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "while"),
    *("conditional", "call", "async-done", "partition-id", "replica-id", "optimization-barrier"),
}
_SLICES = {"dynamic-slice", "slice", "gather"}


@dataclasses.dataclass
class Costs:
    """Costs of one run of a program on one device.

    Attributes:
      flops: operations of matrix products and convolutions, and of kernels where known. For a
        conditional the most expensive branch counts, as on the busiest device.
      mean_flops: the same with the mean over the branches of each conditional.
      bytes: read from and written to main memory, excluding faster memories.
      collectives, kernels: how often each runs.
      unknown_loops: loops with unknown trip counts, counted once.
    """

    flops: float = 0.0
    mean_flops: float = 0.0
    bytes: float = 0.0
    collectives: Counter[Collective] = dataclasses.field(default_factory=Counter)
    kernels: Counter[KernelCall] = dataclasses.field(default_factory=Counter)
    unknown_loops: tuple[str, ...] = ()

    def add(self, other: "Costs", times: int = 1) -> None:
        self.flops += times * other.flops
        self.mean_flops += times * other.mean_flops
        self.bytes += times * other.bytes
        for mine, theirs in (
            (self.collectives, other.collectives),
            (self.kernels, other.kernels),
        ):
            for key, count in theirs.items():
                mine[key] += times * count  # type: ignore[index]
        self.unknown_loops += tuple(n for n in other.unknown_loops if n not in self.unknown_loops)


def program_costs(module: Module) -> Costs:
    """Returns the costs of a complete program on one device."""
    return _Counter(module).costs(module.entry)


class _Counter:
    """Caches the costs of each computation, which may be called many times."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.known: dict[tuple[str, bool], Costs] = {}

    def costs(self, name: str, *, inside: bool = False) -> Costs:
        """Returns the costs of a computation.

        Values `inside` a fusion never reach memory, so their bytes are not counted.
        """
        if (name, inside) not in self.known:
            total = Costs()
            computation = self.module.computations[name]
            for instruction in computation.instructions.values():
                total.add(self._instruction(instruction, computation, inside))
            self.known[name, inside] = total
        return self.known[name, inside]

    def _instruction(self, found: Instruction, computation: Computation, inside: bool) -> Costs:
        costs, opcode = Costs(), found.opcode
        if opcode in ("dot", "convolution"):
            count = _dot_flops if opcode == "dot" else _convolution_flops
            operands = [computation.shapes(operand)[0] for operand in found.operands]
            costs.flops = costs.mean_flops = count(found, *operands)
        elif opcode == "while":
            trips = trip_count(self.module, computation, found)
            if trips is None:
                costs.unknown_loops = (found.name,)
            costs.add(self.costs(found.called("body") or ""), 1 if trips is None else trips)
        elif opcode == "conditional":
            costs.add(self._branches(found))
        elif opcode == "fusion":
            costs.add(self.costs(found.called("calls") or "", inside=True))
        elif opcode in ("call", "async-start"):
            costs.add(self.costs(found.called("to_apply", "calls") or "", inside=inside))
        elif exchange := collective_of(found, computation):
            costs.collectives[exchange] += 1
        elif kernel := kernel_of(found):
            costs.kernels[kernel] += 1
            costs.flops = costs.mean_flops = kernel.flops or 0.0
            if kernel.bytes is not None:
                costs.bytes = kernel.bytes
                return costs
        if not inside:
            costs.bytes += self._bytes(found, computation)
        return costs

    def _branches(self, found: Instruction) -> Costs:
        """Returns the costs of the most expensive branch, with the mean flops of all branches."""
        listed = re.search(r"\bbranch_computations=\{(.*?)\}", found.attributes)
        names = (
            re.findall(r"%?([\w.\-]+)", listed[1])
            if listed
            else [found.called("true_computation") or "", found.called("false_computation") or ""]
        )
        branches = [self.costs(name) for name in names]
        dearest = max(branches, key=lambda branch: (branch.flops, branch.bytes))
        mean = sum(branch.mean_flops for branch in branches) / len(branches)
        return dataclasses.replace(dearest, mean_flops=mean)

    def _bytes(self, found: Instruction, computation: Computation) -> float:
        if found.opcode in _STILL or found.opcode.endswith("-start"):
            return 0.0
        if kernel_call_target(found) in MARKS:
            return 0.0
        if found.opcode.endswith("-done"):  # a copy or collective, counted as if synchronous
            started = computation.instructions[found.operands[0]]
            read = any(_in_memory(computation.shapes(name)) for name in started.operands)
            return read * found.bytes + _in_memory(found.shapes)
        if found.opcode == "fusion":
            inner = self.module.computations[found.called("calls") or ""]
            sizes = [_in_memory(computation.shapes(name)) for name in found.operands]
            reads = sum(
                self._read(inner, inner.parameters[number].name, size)
                for number, size in enumerate(sizes)
            )
            return reads + self._written(inner, inner.root, found.shapes)
        sizes = [_in_memory(computation.shapes(name)) for name in found.operands]
        if found.opcode in _SLICES:
            return min(sizes[0], found.bytes) + sum(sizes[1:]) + _in_memory(found.shapes)
        if found.opcode == "dynamic-update-slice":  # in place
            return 2 * sizes[1]
        return sum(sizes) + _in_memory(found.shapes)

    def _read(self, inner: Computation, name: str, size: float) -> float:
        """Returns the bytes (at most `size`) that a fusion reads of its parameter `name`."""
        read = 0.0
        for user in inner.users[name]:
            if user.opcode in _SLICES and user.operands[0] == name:
                read += user.bytes
            elif user.opcode == "bitcast":
                read += self._read(inner, user.name, size)
            elif user.opcode == "fusion":
                nested = self.module.computations[user.called("calls") or ""]
                for number, operand in enumerate(user.operands):
                    if operand == name:
                        read += self._read(nested, nested.parameters[number].name, size)
            elif user.opcode != "dynamic-update-slice" or user.operands[0] != name:
                return size
        return min(read, size)

    def _written(self, inner: Computation, name: str, shapes: tuple[Shape, ...]) -> float:
        """Returns the bytes that a fusion writes; an in-place update counts only the update."""
        found = inner.instructions[name]
        if found.opcode == "tuple" and len(found.operands) == len(shapes):
            parts = zip(found.operands, shapes, strict=True)
            return sum(self._written(inner, operand, (shape,)) for operand, shape in parts)
        if found.opcode == "bitcast":
            return self._written(inner, found.operands[0], shapes)
        if found.opcode == "dynamic-update-slice":
            update = sum(shape.bytes for shape in inner.shapes(found.operands[1]))
            return min(update, _in_memory(shapes))
        return _in_memory(shapes)


def _in_memory(shapes: tuple[Shape, ...]) -> float:
    return sum(shape.bytes for shape in shapes if shape.space == 0)


def _dot_flops(dot: Instruction, left: Shape, right: Shape) -> float:
    """Returns 2 x elements of the result x contracted sizes."""
    summed = math.prod(left.dims[axis] for axis in dot.numbers("lhs_contracting_dims"))
    return 2.0 * math.prod(dot.shapes[0].dims) * summed


def _convolution_flops(convolution: Instruction, left: Shape, right: Shape) -> float:
    """Returns 2 x multiplications, excluding those with padding and the holes of a dilation.

    The TPU compiler emits batched matrix products as convolutions, with a batch axis as a dilated
    window.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.attributes)
    assert labels is not None
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", _window(convolution)))
    output = convolution.shapes[0].dims
    products = 2.0 * right.dims[labels[2].index("i")]
    products *= output[labels[3].index("b")] * output[labels[3].index("f")]
    for axis in range(len(output) - 2):
        spatial = str(axis)
        low = window.get("pad", "").split("x")[axis].split("_")[0] if "pad" in window else "0"
        products *= _window_products(
            inputs=left.dims[labels[1].index(spatial)],
            kernel=right.dims[labels[2].index(spatial)],
            outputs=output[labels[3].index(spatial)],
            pad=int(low),
            stride=_factor(window, "stride", axis),
            spread=_factor(window, "lhs_dilate", axis),
            dilation=_factor(window, "rhs_dilate", axis),
        )
    return products


def _window(convolution: Instruction) -> str:
    found = re.search(r"\bwindow=\{(.*?)\}", convolution.attributes)
    return found[1] if found else ""


def _factor(window: dict[str, str], name: str, axis: int) -> int:
    return int(window[name].split("x")[axis]) if name in window else 1


def _window_products(
    *, inputs: int, kernel: int, outputs: int, pad: int, stride: int, spread: int, dilation: int
) -> int:
    """Counts the pairs of output and kernel positions on one axis that have an input."""
    common = math.gcd(stride, spread)
    period = spread // common
    pairs = 0
    for place in range(kernel):
        # Outputs o for which o * stride + offset is a multiple of spread that has an input.
        offset = place * dilation - pad
        if offset % common:
            continue
        first = max(0, -(offset // stride))
        last = min(outputs - 1, ((inputs - 1) * spread - offset) // stride)
        one = -(offset // common) * pow(stride // common, -1, period) % period
        first += (one - first) % period
        pairs += max(0, (last - first) // period + 1)
    return pairs
