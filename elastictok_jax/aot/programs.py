"""The programs that an experiment runs, lowered for devices that need not be there."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh, NamedSharding

from elastictok_jax.models.base import Family, Task
from elastictok_jax.models.registry import family_of_config
from elastictok_jax.parallel.sharding import batch_sharding, replicated, with_logical_axes
from elastictok_jax.training.host_consensus import abstract_votes
from elastictok_jax.training.state import abstract_state
from elastictok_jax.training.step import jit_train_step


@dataclasses.dataclass(frozen=True)
class Program:
    """A program to compile.

    Attributes:
      name: "train_step", "encode" or "decode".
      lower: traces it; `lower().compile()` compiles it.
      tokens: that all devices together process in one run.
      model_flops: operations that the method needs for them, of all devices together:
        rematerialisation and LPIPS not counted.
    """

    name: str
    lower: Callable[[], jax.stages.Lowered]
    tokens: int
    model_flops: float


def programs(config: ml_collections.ConfigDict, mesh: Mesh) -> tuple[Program, ...]:
    """Returns the training step of a resolved config as the loop runs it, and the tokenizer's two
    halves: one sequence of the experiment's length on each group of data x fsdp devices."""
    family = family_of_config(config)
    return (
        _train_step(family.task, config, mesh),
        _tokenizer(family, config, mesh, half="encode"),
        _tokenizer(family, config, mesh, half="decode"),
    )


def _placed(shapes: Any, sharding: NamedSharding) -> Any:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes
    )


def _train_step(task: Task, config: ml_collections.ConfigDict, mesh: Mesh) -> Program:
    abstract, rows = abstract_state(task, config, mesh), config.data.batch_size
    batch = _placed(task.batch_spec(rows), batch_sharding(mesh))
    frozen = _placed(task.frozen_shapes(), replicated(mesh))
    step = jit_train_step(task, config, abstract)
    return Program(
        name="train_step",
        lower=lambda: with_logical_axes(step.lower, mesh)(
            abstract, batch, frozen, abstract_votes(mesh)
        ),
        tokens=math.prod(batch["segment_ids"].shape),
        model_flops=rows * task.flops_per_row(),
    )


def _tokenizer(
    family: Family, config: ml_collections.ConfigDict, mesh: Mesh, *, half: str
) -> Program:
    task, codec = family
    rows, sharding = mesh.shape["data"] * mesh.shape["fsdp"], batch_sharding(mesh)
    params = abstract_state(task, config, mesh).params[task.groups[0]]
    inputs = jax.ShapeDtypeStruct(
        (rows, codec.geometry.row_inputs, codec.geometry.input_values), jnp.uint8, sharding=sharding
    )
    segments = jax.ShapeDtypeStruct(inputs.shape[:2], jnp.int32, sharding=sharding)
    tokens = rows, codec.geometry.window * codec.geometry.tokens
    keep = jax.ShapeDtypeStruct(tokens, jnp.bool_, sharding=sharding)
    code = codec.code
    codes = jax.ShapeDtypeStruct((*tokens, *code.shape), code.dtype, sharding=sharding)
    function, values = {
        "encode": (codec.encode_rows, inputs),
        "decode": (codec.decode_rows, codes),
    }[half]
    jitted = jax.jit(function, out_shardings=sharding)
    return Program(
        name=half,
        lower=lambda: with_logical_axes(jitted.lower, mesh)(params, values, keep, segments),
        tokens=math.prod(tokens),
        model_flops=rows * codec.flops_per_row(half),
    )
