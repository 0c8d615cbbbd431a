"""The train state: its shapes and shardings, and its sharded initialisation."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import struct
from jax.sharding import Mesh

from elastictok_jax.models.base import Task
from elastictok_jax.parallel.sharding import param_shardings, replicated
from elastictok_jax.training.optimizer import make_optimizer


@struct.dataclass
class TrainState:
    """Everything that a step changes.

    Attributes:
      step: int32 scalar, number of updates done.
      params: float32 tree of each parameter group.
      opt_state: optax state of each group.
      ema_params: trees like `params`, of the groups whose optimizer.ema_decay is above 0.
    """

    step: jax.Array
    params: dict[str, Any]
    opt_state: dict[str, optax.OptState]
    ema_params: dict[str, Any]

    @property
    def eval_params(self) -> Mapping[str, Any]:
        """The weights to evaluate and export: the average of each group that has one."""
        return {**self.params, **self.ema_params}


def init_state(task: Task, config: ml_collections.ConfigDict) -> TrainState:
    """Returns the state at step 0, a function of `config.seed`."""
    return _first_state(nn.meta.unbox(task.init(jax.random.key(config.seed))), task, config)


def _first_state(params, task: Task, config: ml_collections.ConfigDict) -> TrainState:
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state={
            group: make_optimizer(task.optimizer(group), config).init(params[group])
            for group in task.groups
        },
        # Copies, since all trees are donated to the step.
        ema_params={
            group: jax.tree.map(jnp.copy, params[group])
            for group in task.groups
            if task.optimizer(group).ema_decay
        },
    )


def abstract_state(task: Task, config: ml_collections.ConfigDict, mesh: Mesh) -> TrainState:
    """Returns ShapeDtypeStructs with shardings; moments and averages are sharded as weights are."""
    boxed = jax.eval_shape(lambda: task.init(jax.random.key(0)))
    shapes = jax.eval_shape(lambda params: _first_state(params, task, config), nn.meta.unbox(boxed))
    weights, everywhere = param_shardings(boxed, mesh), replicated(mesh)
    shardings: Any = TrainState(
        step=everywhere,  # type: ignore[arg-type]
        params=weights,
        opt_state={
            group: optax.tree.map_params(
                make_optimizer(task.optimizer(group), config),
                lambda _, sharding: sharding,
                shapes.opt_state[group],
                weights[group],
                transform_non_params=lambda _: everywhere,
            )
            for group in task.groups
        },
        ema_params={group: weights[group] for group in shapes.ema_params},
    )
    return jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def init_state_sharded(
    task: Task, config: ml_collections.ConfigDict, abstract: TrainState
) -> TrainState:
    """Returns `init_state`, of which each device computes only its own shards."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(lambda: init_state(task, config), out_shardings=shardings)()
