"""`elastictok compile`: predicts whether an experiment fits a pod, and its speed."""

import re
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh

from elastictok_jax.aot.costs import Costs, program_costs
from elastictok_jax.aot.hlo import parse_module
from elastictok_jax.aot.programs import Program, programs
from elastictok_jax.aot.roofline import roofline
from elastictok_jax.aot.topology import Topology
from elastictok_jax.config import resolve_config
from elastictok_jax.errors import RunError, first_line
from elastictok_jax.hardware import GIB, Chip
from elastictok_jax.models.registry import family_of_config
from elastictok_jax.parallel.mesh import make_mesh

Results = dict[str, Any]


def compile_experiment(config: ml_collections.ConfigDict, topology: Topology) -> Results:
    """Compiles the programs of an experiment for a pod and analyses their costs, without data.

    Returns:
      The output of `--json`: the pod and the mesh, the figures of the training step, and those of
      the tokenizer under "encode" and "decode". `program_report` documents the figures.

    Raises:
      UsageError: if the config is invalid, or its mesh does not fit the pod.
      RunError: if the compiler fails.
    """
    config = resolve_config(config)
    mesh = make_mesh(config, topology.devices, check_model=family_of_config(config).task.check_mesh)
    train_step, *halves = programs(config, mesh)
    return {
        "experiment": config.name,
        "topology": topology.name,
        "slices": topology.slices,
        "chips": len(topology.devices) // topology.chip.devices,
        "devices": len(topology.devices),
        "mesh": dict(mesh.shape),
        **_compile_program(train_step, mesh, topology.chip),
        **{half.name: _compile_program(half, mesh, topology.chip) for half in halves},
    }


def _compile_program(program: Program, mesh: Mesh, chip: Chip) -> Results:
    """Compiles and analyses one program.

    A program that the compiler rejects for lack of memory does not fit and has no other figures.

    Raises:
      RunError: if the compiler fails for another reason.
    """
    kind = mesh.devices.flat[0].device_kind
    print(f"compiling {program.name} for {mesh.size} x {kind}", file=sys.stderr, flush=True)
    start = time.perf_counter()
    try:
        compiled = program.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error) and "hbm" in str(error).lower():
            return report_compile_refusal(str(error), chip)
        reason = first_line(error)
        raise RunError(f"the TPU compiler failed on {program.name}: {reason}") from error
    results = program_report(compiled, mesh=mesh, chip=chip, model_flops=program.model_flops)
    seconds = results["predicted"]["step_seconds"]
    return results | {
        "tokens": program.tokens,
        "predicted_tokens_per_second": program.tokens / seconds,
        "compile_seconds": time.perf_counter() - start,
    }


def report_compile_refusal(message: str, chip: Chip) -> Results:
    """Returns the results of a program that needs more memory than a device has."""
    needed = re.search(r"\((\d[\d.]*)([KMGT])\)? exceeds|Used (\d[\d.]*)([KMGT]) of", message)
    total = None
    if needed:
        number, unit = needed[1] or needed[3], needed[2] or needed[4]
        total = float(number) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[unit]
    return {
        "fits": False,
        "bytes_per_device": {"total": total, "usable": chip.usable_bytes},
        "notes": [f"the compiler refused it: {message.splitlines()[0]}"],
    }


def program_report(
    compiled: jax.stages.Compiled, *, mesh: Mesh, chip: Chip, model_flops: float
) -> Results:
    """Returns figures of a compiled program on `chip`, which may differ from its target.

    Returns:
      fits: whether `bytes_per_device["total"]` is at most the usable memory.
      bytes_per_device: `memory_sizes`, and the chip's capacity and usable memory.
      flops_per_device: operations of matrix products with the most expensive branches;
        `mean_branch_flops_per_device`: with the mean of the branches; `model_flops_per_device`:
        those of the method.
      moved_bytes_per_device: to and from main memory; `arithmetic_intensity`: flops per byte.
      collectives: kind, mesh axes, group size, count, bytes of each and in total, per device.
      kernels: name, count, flops of each and their basis.
      predicted: seconds by term, the bound, and fractions of the peak.
      notes: limitations of the figures.
    """
    text = compiled.as_text()
    assert text is not None
    costs = program_costs(parse_module(text))
    slice_of = [getattr(device, "slice_index", 0) for device in mesh.devices.flat]
    sizes = memory_sizes(compiled)
    line = roofline(costs, chip=chip, slice_of=slice_of)
    peak = chip.peak_flops / chip.devices
    mine = model_flops / mesh.size
    return {
        "fits": sizes["total"] <= chip.usable_bytes,
        "bytes_per_device": sizes
        | {"capacity": chip.hbm_bytes / chip.devices, "usable": chip.usable_bytes},
        "flops_per_device": costs.flops,
        "mean_branch_flops_per_device": costs.mean_flops,
        "model_flops_per_device": mine,
        "moved_bytes_per_device": costs.bytes,
        "arithmetic_intensity": costs.flops / max(costs.bytes, 1.0),
        "collectives": _collective_rows(costs, dict(mesh.shape), slice_of),
        "kernels": _kernel_rows(costs),
        "predicted": {
            **{f"{term}_seconds": seconds for term, seconds in line.terms.items()},
            "step_seconds": line.seconds,
            "bound": line.bound,
            "serial_seconds": line.serial_seconds,
            "hardware_flops_utilisation": costs.flops / line.seconds / peak,
            "model_flops_utilisation": mine / line.seconds / peak,
        },
        "notes": compile_notes(costs, network_known=line.network is not None),
    }


def memory_sizes(compiled: jax.stages.Compiled) -> dict[str, float]:
    """Returns the bytes per device of a compiled program, by kind.

    "aliased" outputs reuse donated arguments, and "total" is the memory needed at once: arguments +
    outputs - aliased + temporaries + generated_code. "peak" is XLA's own figure.
    """
    stats: Any = compiled.memory_analysis()
    sizes = {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "aliased": stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "generated_code": stats.generated_code_size_in_bytes,
    }
    return sizes | {
        "total": sum(sizes.values()) - 2 * sizes["aliased"],
        "peak": stats.peak_memory_in_bytes,
    }


def _collective_rows(costs: Costs, mesh: dict[str, int], slice_of: Sequence[int]) -> list[Results]:
    """Groups collectives of equal kind, size and group, sorted by descending bytes."""
    devices = len(slice_of)
    counts: defaultdict[tuple, int] = defaultdict(int)
    for exchange, count in costs.collectives.items():
        key = (
            exchange.kind,
            exchange.axes(mesh),
            exchange.group_size(devices),
            exchange.bytes,
            exchange.crosses(slice_of),
        )
        counts[key] += count
    rows = [
        {
            "kind": kind,
            "axes": list(axes),
            "group_size": group_size,
            "count": count,
            "bytes_each": size,
            "bytes_total": size * count,
            "between_slices": across,
        }
        for (kind, axes, group_size, size, across), count in counts.items()
    ]
    return sorted(rows, key=lambda row: -row["bytes_total"])


def _kernel_rows(costs: Costs) -> list[Results]:
    """Returns rows of kernels, sorted by name."""
    rows = [
        {"name": kernel.name, "count": n, "flops_each": kernel.flops, "basis": kernel.basis}
        for kernel, n in costs.kernels.items()
    ]
    return sorted(rows, key=lambda row: row["name"])


def compile_notes(costs: Costs, *, network_known: bool) -> list[str]:
    """Returns notes on what the figures omit or overestimate."""
    found = []
    unknown = sorted({kernel.name for kernel in costs.kernels if kernel.basis == "unknown"})
    if unknown:
        found.append(
            f"operations of {', '.join(unknown)} are not stated and not counted: flops_per_device "
            "and the predicted time are too low"
        )
    if any(kernel.basis == "shapes" for kernel in costs.kernels):
        found.append(
            "operations of splash attention are derived from its operands, assuming a full mask"
        )
    if costs.mean_flops < costs.flops:
        found.append(
            f"each conditional counts as its most expensive branch, as on the busiest device; the "
            f"mean over branches is {costs.mean_flops:.3g} operations"
        )
    if costs.unknown_loops:
        found.append(f"loops with unknown trip counts count once: {', '.join(costs.unknown_loops)}")
    if not network_known:
        found.append(
            "no bandwidth between slices is published: the time excludes those collectives"
        )
    return found


def report_text(results: Results) -> str:
    """Formats the results for reading."""
    mesh = " x ".join(f"{axis}={size}" for axis, size in results["mesh"].items() if size > 1)
    slices = f" x {results['slices']} slices" if results["slices"] > 1 else ""
    lines = [
        f"{results['experiment']} on {results['topology']}{slices}: {results['chips']} chips, "
        f"{results['devices']} devices, mesh {mesh or 'of one device'}"
    ]
    for name in ("train_step", "encode", "decode"):
        part = results if name == "train_step" else results[name]
        lines += ["", f"{name}: {'fits' if part['fits'] else 'DOES NOT FIT'}", *_describe(part)]
    return "\n".join(lines)


def _describe(part: Results) -> list[str]:
    sizes = part["bytes_per_device"]
    kinds = ("arguments", "outputs", "aliased", "temporaries", "generated_code")
    parts = ", ".join(f"{kind} {_bytes(sizes[kind])}" for kind in kinds if kind in sizes)
    total = "more" if sizes["total"] is None else _bytes(sizes["total"])
    lines = [
        f"  memory a device   {total} of {sizes['usable'] / GIB:.2f} GiB usable"
        + (f" ({parts})" if parts else "")
    ]
    if "predicted" in part:
        guess = part["predicted"]
        terms = ", ".join(
            f"{term} {_seconds(guess[f'{term}_seconds'])}"
            for term in ("compute", "memory", "interconnect", "network")
            if guess[f"{term}_seconds"]
        )
        lines += [
            f"  work a device     {part['flops_per_device']:.3g} flops, "
            f"{_bytes(part['moved_bytes_per_device'])} of main memory traffic, "
            f"{part['arithmetic_intensity']:.0f} flops a byte",
            f"  predicted         {_seconds(guess['step_seconds'])} with full overlap "
            f"({guess['bound']} bound), {_seconds(guess['serial_seconds'])} with none",
            f"                    {terms}",
            f"                    {part['predicted_tokens_per_second']:,.0f} tokens/s, "
            f"model flops utilisation {guess['model_flops_utilisation']:.0%}, "
            f"hardware {guess['hardware_flops_utilisation']:.0%}",
        ]
        lines += _collective_lines(part["collectives"])
        for row in part["kernels"]:
            flops = "unknown" if row["flops_each"] is None else f"{row['flops_each']:.3g}"
            lines.append(f"  kernel            {row['count']} x {row['name']}, {flops} flops each")
    return lines + [f"  note: {note}" for note in part["notes"]]


def _collective_lines(rows: list[Results]) -> list[str]:
    groups: defaultdict[tuple, list[Results]] = defaultdict(list)
    for row in rows:
        groups[row["kind"], tuple(row["axes"]), row["group_size"]].append(row)
    ordered = sorted(groups.items(), key=lambda item: -sum(r["bytes_total"] for r in item[1]))
    return [
        f"  collective        {sum(row['count'] for row in same)} x {kind} over "
        f"{'+'.join(axes) or 'no axis'} ({size}), "
        f"{_bytes(sum(row['bytes_total'] for row in same))}"
        for (kind, axes, size), same in ordered
    ]


def _bytes(size: float) -> str:
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 2**power:
            return f"{size / 2**power:.2f} {unit}"
    return f"{size:.0f} B"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
