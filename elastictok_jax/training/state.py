"""The train state, abstract first: shapes, then shardings, then a sharded initialisation."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import struct
from jax.sharding import Mesh

from elastictok_jax.models.elastictok.model import build_model, init_params
from elastictok_jax.parallel.sharding import param_shardings, replicated
from elastictok_jax.training.optimizer import make_optimizer


@struct.dataclass
class TrainState:
    """All that a step changes.

    Attributes:
      step: int32 scalar, updates done.
      params: float32 tree.
      opt_state: optax state.
      ema_params: tree like `params`, or None when optimizer.ema_decay is 0.
    """

    step: jax.Array
    params: Any
    opt_state: optax.OptState
    ema_params: Any

    @property
    def eval_params(self):
        """The weights to evaluate and export: the average where there is one."""
        return self.params if self.ema_params is None else self.ema_params


def _boxed_params(config: ml_collections.ConfigDict, key: jax.Array):
    return init_params(build_model(config), key)


def init_state(config: ml_collections.ConfigDict) -> TrainState:
    """The state at step 0, a function of `config.seed`."""
    params = nn.meta.unbox(_boxed_params(config, jax.random.key(config.seed)))
    # A copy of its own, since both trees are donated to the step.
    ema_params = jax.tree.map(jnp.copy, params) if config.optimizer.ema_decay else None
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=make_optimizer(config).init(params),
        ema_params=ema_params,
    )


def abstract_state(config: ml_collections.ConfigDict, mesh: Mesh) -> TrainState:
    """ShapeDtypeStructs with their shardings: optimizer moments and EMA lie as their weights."""
    shapes = jax.eval_shape(lambda: init_state(config))
    boxed = jax.eval_shape(lambda: _boxed_params(config, jax.random.key(0)))
    weights, whole = param_shardings(boxed, mesh), replicated(mesh)
    shardings: Any = TrainState(
        step=whole,  # type: ignore[arg-type]
        params=weights,
        opt_state=optax.tree.map_params(
            make_optimizer(config),
            lambda _, sharding: sharding,
            shapes.opt_state,
            weights,
            transform_non_params=lambda _: whole,
        ),
        ema_params=None if shapes.ema_params is None else weights,
    )
    return jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def sharded_init(config: ml_collections.ConfigDict, abstract: TrainState) -> TrainState:
    """`init_state`, each device making only its own shards."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(lambda: init_state(config), out_shardings=shardings)()
