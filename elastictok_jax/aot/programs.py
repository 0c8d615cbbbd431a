"""The programs that an experiment runs, lowered for devices that need not be there.

Dimension key: B rows, S tokens, D values a patch, Z latent dims.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from elastictok_jax.config import block_tokens, patch_values, sequence_tokens
from elastictok_jax.layers.bottlenecks import FSQ
from elastictok_jax.layers.patching import to_float, to_uint8
from elastictok_jax.models.elastictok.model import abstract_params, build_model
from elastictok_jax.parallel.sharding import batch_sharding, in_mesh, replicated
from elastictok_jax.perceptual.lpips import lpips_shapes
from elastictok_jax.training.host_consensus import abstract_votes
from elastictok_jax.training.state import abstract_state
from elastictok_jax.training.step import jit_train_step, sequence_layout
from elastictok_jax.training.throughput import train_flops_per_token


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
    """The training step of a resolved config as the loop runs it, and the tokenizer's two halves:
    one sequence of the experiment's length on each group of data x fsdp devices."""
    return (
        _train_step(config, mesh),
        _tokenizer(config, mesh, half="encode"),
        _tokenizer(config, mesh, half="decode"),
    )


def _batch(config: ml_collections.ConfigDict, mesh: Mesh, *, rows: int) -> dict[str, Any]:
    shape, sharding = (rows, sequence_tokens(config)), batch_sharding(mesh)
    return {
        "patches": jax.ShapeDtypeStruct(
            (*shape, patch_values(config)), jnp.uint8, sharding=sharding
        ),
        "segment_ids": jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding),
    }


def _train_step(config: ml_collections.ConfigDict, mesh: Mesh) -> Program:
    abstract = abstract_state(config, mesh)
    lpips_params = {}
    if config.loss.lpips_weight:
        lpips_params = jax.tree.map(
            lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=replicated(mesh)),
            lpips_shapes(config.loss.lpips_net),
            is_leaf=lambda shape: isinstance(shape, tuple),
        )
    batch = _batch(config, mesh, rows=config.data.batch_size)
    step = jit_train_step(config, abstract)
    tokens = config.data.batch_size * sequence_tokens(config)
    return Program(
        name="train_step",
        lower=lambda: in_mesh(step.lower, mesh)(
            abstract, batch, lpips_params, abstract_votes(mesh)
        ),
        tokens=tokens,
        model_flops=tokens * train_flops_per_token(config),
    )


def _tokenizer(config: ml_collections.ConfigDict, mesh: Mesh, *, half: str) -> Program:
    model, per_block = build_model(config), block_tokens(config)
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    batch = _batch(config, mesh, rows=rows)
    params, tokens = abstract_state(config, mesh).params, batch["segment_ids"]
    keep_BS = jax.ShapeDtypeStruct(tokens.shape, jnp.bool_, sharding=tokens.sharding)

    def apply(params, values, keep_BS, segments_BS):
        places = sequence_layout({"segment_ids": segments_BS}, tokens_per_block=per_block)
        return model.apply({"params": params}, values, keep_BS, places, method=half)

    def encode(params, patches_BSD, keep_BS, segments_BS):
        return apply(params, to_float(patches_BSD), keep_BS, segments_BS)

    def decode(params, codes, keep_BS, segments_BS):
        return to_uint8(apply(params, codes, keep_BS, segments_BS))

    if half == "encode":
        function, values = encode, batch["patches"]
    else:
        fsq = isinstance(model.bottleneck, FSQ)
        shape, dtype = ((), jnp.int32) if fsq else ((config.model.vae_dim,), jnp.float32)
        function = decode
        values = jax.ShapeDtypeStruct((*tokens.shape, *shape), dtype, sharding=tokens.sharding)
    jitted = jax.jit(function, out_shardings=tokens.sharding)
    return Program(
        name=half,
        lower=lambda: in_mesh(jitted.lower, mesh)(params, values, keep_BS, tokens),
        tokens=math.prod(tokens.shape),
        model_flops=math.prod(tokens.shape) * _forward_flops_per_token(config, half=half),
    )


def _forward_flops_per_token(config: ml_collections.ConfigDict, *, half: str) -> float:
    """2 for each weight of a matrix, and 4 x width a visible key a layer."""
    part = {"encode": "encoder", "decode": "decoder"}[half]
    leaves = jax.tree_util.tree_flatten_with_path(abstract_params(config)[part])[0]
    weights = sum(math.prod(leaf.shape) for path, leaf in leaves if path[-1].key == "kernel")
    visible_keys = block_tokens(config) * (config.data.sequence_blocks + 1) / 2
    return 2.0 * weights + 4.0 * config.model[f"{part}_layers"] * config.model.width * visible_keys
