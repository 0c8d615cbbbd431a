"""Estimates the costs of hand-written kernels, which are opaque calls in HLO."""

import dataclasses
import math
import re

from elastictok_jax.aot.hlo import Instruction, parse_shapes

# The compiler's own calls, which only annotate or move memory.
MARKS = ("AllocateBuffer", "ConcatBitcast", "Sharding")
MOVES = ("ZeroCrop", "MoveToHost", "MoveToDevice")
# Matrix products per pass of JAX's splash attention, each of queries x keys x head width.
SPLASH_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}
SPLASH_FUSED_BACKWARD = 5


@dataclasses.dataclass(frozen=True)
class KernelCall:
    """A custom call.

    Attributes:
      name: the kernel's name, or the call's target if it has none.
      flops: operations of one call; None if neither stated nor known.
      basis: "stated" by the kernel, "shapes" of a known kernel's operands assuming a full mask, or
        "unknown".
      bytes: bytes that it moves, if stated.
    """

    name: str
    flops: float | None
    basis: str
    bytes: float | None = None


def kernel_call_target(instruction: Instruction) -> str:
    """Returns the target of a custom call; empty for any other instruction."""
    if instruction.opcode != "custom-call":
        return ""
    found = re.search(r'\bcustom_call_target="([^"]*)"', instruction.attributes)
    return found[1] if found else ""


def kernel_of(instruction: Instruction) -> KernelCall | None:
    """Returns the kernel that a custom call runs; None if the call is the compiler's own."""
    name = kernel_call_target(instruction)
    if not name or name in (*MARKS, *MOVES):
        return None
    if name == "tpu_custom_call":
        name = re.sub(r"(\.\d+|\.clone)+$", "", instruction.name)
    stated = re.search(
        r'"cost_estimate":\{"flops":"(\d+)".*?"bytes_accessed":"(\d+)"', instruction.attributes
    )
    if stated:
        return KernelCall(name, float(stated[1]), "stated", float(stated[2]))
    flops = _splash_flops(name, instruction.attributes)
    return KernelCall(name, flops, "unknown" if flops is None else "shapes")


def _splash_flops(name: str, attributes: str) -> float | None:
    splash = re.match(r"splash_m[hq]a_(fwd|dq|dkv)", name)
    layouts = re.search(r"operand_layout_constraints=\{(.*?\})\}", attributes)
    if not splash or not layouts:
        return None
    arrays = [s for s in parse_shapes(layouts[1]) if "f" in s.dtype and len(s.dims) >= 2]
    if len(arrays) < 3:
        return None
    query, key = arrays[0].dims, arrays[1].dims
    products = SPLASH_PRODUCTS[splash[1]]
    if splash[1] == "dkv" and re.search(r"use_fused_bwd_kernel\W+true", attributes):
        products = SPLASH_FUSED_BACKWARD
    return products * 2.0 * math.prod(query) * key[-2]
