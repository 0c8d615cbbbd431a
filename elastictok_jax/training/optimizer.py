"""AdamW with warm-up, a schedule, gradient clipping, and no decay of norms and embeddings."""

import jax
import ml_collections
import optax


def make_schedule(
    settings: ml_collections.ConfigDict, config: ml_collections.ConfigDict
) -> optax.Schedule:
    """Returns the learning rate by step: linear warm-up, then cosine to `final_fraction`, or
    constant.

    Args:
      settings: of the parameter group, with the keys of `config.optimizer`.
    """
    peak, warmup = settings.learning_rate, settings.warmup_steps
    if settings.schedule == "constant":
        return optax.join_schedules(
            [optax.linear_schedule(0.0, peak, warmup), optax.constant_schedule(peak)], [warmup]
        )
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=peak,
        warmup_steps=warmup,
        decay_steps=max(config.train.steps, warmup + 1),
        end_value=peak * settings.final_fraction,
    )


def decayed_parameters(params):
    """Returns a tree of bools: weight decay applies to matrices, not to norms and embeddings."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def make_optimizer(
    settings: ml_collections.ConfigDict, config: ml_collections.ConfigDict
) -> optax.GradientTransformation:
    """Returns the optimizer of a parameter group: clipping by global norm, then AdamW."""
    return optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        optax.adamw(
            make_schedule(settings, config),
            b1=settings.b1,
            b2=settings.b2,
            weight_decay=settings.weight_decay,
            mask=decayed_parameters,
        ),
    )
