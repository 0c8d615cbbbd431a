"""Parses the text of optimised HLO, as returned by `compiled.as_text()`."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator

_BITS = {"pred": 8, "token": 0, "opaque": 0}  # other names contain their bits: f32, bf16, s4
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_START = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NUMBER = re.compile(r"-?\d+")


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array's type. `space` is its memory space: 0 is the device's main memory."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def bytes(self) -> float:
        bits = _BITS.get(self.dtype)
        if bits is None:
            bits = int(re.findall(r"\d+", self.dtype)[0])  # f8e4m3fn has 8
        return math.prod(self.dims) * bits / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO.

    A tuple's `shapes` are its leaves in order; `literal` is the text between the parentheses, such
    as a constant's value or a parameter's number.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    literal: str
    attributes: str

    @property
    def bytes(self) -> float:
        return sum(shape.bytes for shape in self.shapes)

    def called(self, *attributes: str) -> str | None:
        """Returns the computation named by the first of `attributes` that is present."""
        for attribute in attributes:
            found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
            if found:
                return found[1]
        return None

    def numbers(self, attribute: str) -> tuple[int, ...]:
        """Returns the numbers of `attribute={1,2}`; empty if it is absent."""
        found = re.search(rf"\b{attribute}={{([\d,]*)}}", self.attributes)
        return tuple(map(int, _NUMBER.findall(found[1]))) if found else ()


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in execution order."""

    name: str
    instructions: dict[str, Instruction]
    root: str

    def shapes(self, operand: str) -> tuple[Shape, ...]:
        return self.instructions[operand].shapes

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that read each instruction."""
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in instruction.operands:
                users[operand].append(instruction)
        return users

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(i.literal): i for i in self.instructions.values() if i.opcode == "parameter"}


@dataclasses.dataclass(frozen=True)
class Module:
    """A program: its computations by name, and the entry computation."""

    computations: dict[str, Computation]
    entry: str


def parse_module(text: str) -> Module:
    """Parses the computations of an HLO module.

    Raises:
      ValueError: if it has no entry computation.
    """
    computations: dict[str, Computation] = {}
    instructions: dict[str, Instruction] = {}
    entry = name = None
    root = ""
    for line in _logical_lines(text):
        if name is None:
            started = _COMPUTATION.match(line)
            if started:
                name, instructions, root = started[2], {}, ""
                entry = name if started[1] else entry
        elif line.startswith("}"):
            computations[name] = Computation(name, instructions, root or [*instructions][-1])
            name = None
        else:
            started = _START.match(line)
            assert started is not None
            instruction = _parse_instruction(started[2], line[started.end() :])
            instructions[instruction.name] = instruction
            root = instruction.name if started[1] else root
    if entry is None:
        raise ValueError("this text has no ENTRY computation: it is not an HLO module")
    return Module(computations, entry)


def _logical_lines(text: str) -> Iterator[str]:
    """Yields lines, rejoining those that an attribute broke in two."""
    held: list[str] = []
    inside = False
    for line in text.splitlines():
        if inside and not (_START.match(line) or line == "}" or line.startswith("}, ")):
            held.append(line)
            continue
        if held:
            yield "".join(held)
        held = [line]
        inside = (inside or bool(_COMPUTATION.match(line))) and not line.startswith("}")
    yield "".join(held)


def _parse_instruction(name: str, text: str) -> Instruction:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    rest = text[end:].lstrip()
    opcode = rest[: rest.index("(")]
    close = _closing(rest, len(opcode))
    inside = rest[len(opcode) + 1 : close]
    return Instruction(
        name=name,
        opcode=opcode,
        shapes=parse_shapes(text[:end]),
        operands=tuple(re.findall(r"%([\w.\-]+)", inside)),
        literal=inside,
        attributes=rest[close + 1 :],
    )


def _closing(text: str, start: int) -> int:
    """Returns the index of the parenthesis that closes the one at `start`."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    raise ValueError(f"no closing parenthesis in {text[:80]!r}")


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """Parses every array in a type: f32[2,3]{1,0:T(8,128)S(1)}, or a tuple of them."""
    shapes = []
    for dtype, dims, layout in _SHAPE.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(map(int, _NUMBER.findall(dims)))
        shapes.append(Shape(dtype, sizes, int(space[1]) if space else 0))
    return tuple(shapes)


Argument = Callable[[int, tuple[int, ...]], int | None]
_SAME = ("copy", "bitcast", "convert", "reshape", "copy-start", "copy-done", "optimization-barrier")
_ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
}
_FLIPPED = {"LT": "LT", "LE": "LE", "GT": "LT", "GE": "LE", "NE": "NE"}


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """Returns how often the body of a `while` runs; None if that depends on runtime values.

    Uses XLA's own annotation if present. Otherwise both sides of the condition's comparison are
    evaluated before and after one iteration, assuming that they change linearly.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    condition = module.computations[loop.called("condition") or ""]
    body = module.computations[loop.called("body") or ""]

    def at_first(_: int, path: tuple[int, ...]) -> int | None:
        return _scalar(module, computation, loop.operands[0], path, lambda *_: None)

    def at_second(_: int, path: tuple[int, ...]) -> int | None:
        return _scalar(module, body, body.root, path, at_first)

    first = _compared(module, condition, condition.root, at_first)
    second = _compared(module, condition, condition.root, at_second)
    if first is None or second is None:
        return None
    direction, left = first
    turn = left - second[1]
    if direction == "LE":  # a <= b is a < b + 1
        left += 1
    if direction == "NE" and left < 0:  # counts down
        left, turn = -left, -turn
    return max(0, -(-left // turn)) if turn > 0 else None


def _compared(
    module: Module, computation: Computation, name: str, argument: Argument
) -> tuple[str, int] | None:
    """Returns (direction, difference of the two sides) of a comparison, or None."""
    found = computation.instructions[name]
    if found.opcode in ("fusion", "call"):
        inner = module.computations[found.called("calls", "to_apply") or ""]
        return _compared(
            module, inner, inner.root, _passed(module, computation, found.operands, argument)
        )
    direction = re.search(r"direction=(\w+)", found.attributes)
    if found.opcode != "compare" or not direction or direction[1] not in _FLIPPED:
        return None
    left, right = (_scalar(module, computation, side, (), argument) for side in found.operands)
    if left is None or right is None:
        return None
    sign = -1 if direction[1].startswith("G") else 1
    return _FLIPPED[direction[1]], sign * (right - left)


def _passed(
    module: Module, computation: Computation, operands: tuple[str, ...], argument: Argument
) -> Argument:
    return lambda number, path: _scalar(module, computation, operands[number], path, argument)


def _scalar(
    module: Module, computation: Computation, name: str, path: tuple[int, ...], argument: Argument
) -> int | None:
    """Returns the integer at `path` of an instruction's result if it is static, else None."""
    found = computation.instructions[name]
    follow = functools.partial(_scalar, module, computation)
    if found.opcode == "constant":
        return int(found.literal) if _NUMBER.fullmatch(found.literal) else None
    if found.opcode == "parameter":
        return argument(int(found.literal), path)
    if found.opcode == "get-tuple-element":
        index = re.search(r"\bindex=(\d+)", found.attributes)
        assert index is not None
        return follow(found.operands[0], (int(index[1]), *path), argument)
    if found.opcode == "tuple":
        return follow(found.operands[path[0]], path[1:], argument)
    if found.opcode in _SAME:
        return follow(found.operands[0], path, argument)
    if found.opcode in ("fusion", "call"):
        inner = module.computations[found.called("calls", "to_apply") or ""]
        passed = _passed(module, computation, found.operands, argument)
        return _scalar(module, inner, inner.root, path, passed)
    if found.opcode in _ARITHMETIC:
        left, right = (follow(side, (), argument) for side in found.operands)
        return None if left is None or right is None else _ARITHMETIC[found.opcode](left, right)
    return None
