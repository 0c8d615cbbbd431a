"""Makes the jitted training step of any task.

Dimension key: B rows of a batch.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from elastictok_jax.models.base import Batch, Metrics, StepKeys, Task
from elastictok_jax.parallel.sharding import replicated
from elastictok_jax.training.host_consensus import with_votes
from elastictok_jax.training.optimizer import make_optimizer, make_schedule
from elastictok_jax.training.state import TrainState


def make_train_step(
    task: Task, config: ml_collections.ConfigDict
) -> Callable[[TrainState, Batch, Any], tuple[TrainState, Metrics]]:
    """Returns train_step(state, batch, frozen) -> (state, metrics), to be jitted and donated.

    The batch is split into `optimizer.accumulate_steps` microbatches whose gradients add up to
    those of the batch. The loss of each parameter group is differentiated with respect to that
    group, for all groups at the same parameters; then each group gets one optimizer update and one
    EMA update.
    """
    groups, pieces = task.groups, config.optimizer.accumulate_steps
    optimizers = {group: make_optimizer(task.optimizer(group), config) for group in groups}
    schedules = {group: make_schedule(task.optimizer(group), config) for group in groups}

    def train_step(state: TrainState, batch: Batch, frozen):
        keys = StepKeys(config.seed, state.step)
        totals = task.totals(batch)

        def gradients(piece: tuple[Batch, jax.Array]):
            grads: dict[str, Any] = {}
            metrics: Metrics = {}
            for group in groups:

                def loss(params, group=group):
                    every = {**state.params, group: params}
                    shared = dict(frozen=frozen, keys=keys, totals=totals)
                    total, terms = task.loss(group, every, *piece, **shared)
                    return total, {f"loss{_suffix(group, groups)}": total, **terms}

                grads[group], terms = jax.grad(loss, has_aux=True)(state.params[group])
                metrics |= terms
            return grads, metrics

        # Row r goes to microbatch r % pieces, so that rows stay on the devices that hold them.
        rows_B = jnp.arange(next(iter(batch.values())).shape[0], dtype=jnp.int32)
        if pieces == 1:
            grads, metrics = gradients((batch, rows_B))
        else:
            cut = jax.tree.map(
                lambda x: x.reshape(-1, pieces, *x.shape[1:]).swapaxes(0, 1), (batch, rows_B)
            )
            shapes = jax.eval_shape(gradients, jax.tree.map(lambda x: x[0], cut))
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            (grads, metrics), _ = jax.lax.scan(
                lambda sums, piece: (jax.tree.map(jnp.add, sums, gradients(piece)), None),
                zeros,
                cut,
            )
        params, opt_state, ema_params = {}, {}, {}
        for group in groups:
            updates, opt_state[group] = optimizers[group].update(
                grads[group], state.opt_state[group], state.params[group]
            )
            params[group] = optax.apply_updates(state.params[group], updates)
            if group in state.ema_params:
                decay = task.optimizer(group).ema_decay
                ema_params[group] = _averaged(
                    state.ema_params[group], params[group], step=state.step, decay=decay
                )
            suffix = _suffix(group, groups)
            metrics[f"grad_norm{suffix}"] = optax.tree.norm(grads[group])
            metrics[f"learning_rate{suffix}"] = schedules[group](state.step)
        if "segment_ids" in batch:
            metrics["padding_fraction"] = 1.0 - jnp.mean(batch["segment_ids"] != 0)
        state = TrainState(
            step=state.step + 1, params=params, opt_state=opt_state, ema_params=ema_params
        )
        return state, metrics

    return train_step


def _suffix(group: str, groups: tuple[str, ...]) -> str:
    """Returns the suffix of a group's metrics; those of the first group have none."""
    return "" if group == groups[0] else f"_{group}"


def _averaged(ema_params, params, *, step: jax.Array, decay: float):
    """Returns the next average of the weights.

    Its memory is short at first, so that it forgets the initial weights.
    """
    rate = 1.0 - jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(
        lambda average, value: average + rate * (value - average), ema_params, params
    )


def jit_train_step(task: Task, config: ml_collections.ConfigDict, abstract: TrainState):
    """Returns the jitted step that runs are trained with and that `aot` compiles.

    It also takes the votes of hosts, donates the state, shards it as `abstract` is, and replicates
    the metrics. Call or lower it inside `with_logical_axes`.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    metrics = replicated(shardings.step.mesh)
    step = with_votes(make_train_step(task, config))
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, metrics))
