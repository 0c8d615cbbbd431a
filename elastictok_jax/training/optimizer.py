"""AdamW with warm-up, a schedule, clipping, and no decay on norms and embeddings."""

import jax
import ml_collections
import optax


def make_schedule(config: ml_collections.ConfigDict) -> optax.Schedule:
    """Learning rate by step: linear warm-up, then cosine to `final_fraction` or constant."""
    peak, warmup = config.optimizer.learning_rate, config.optimizer.warmup_steps
    if config.optimizer.schedule == "constant":
        return optax.join_schedules(
            [optax.linear_schedule(0.0, peak, warmup), optax.constant_schedule(peak)], [warmup]
        )
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=peak,
        warmup_steps=warmup,
        decay_steps=max(config.train.steps, warmup + 1),
        end_value=peak * config.optimizer.final_fraction,
    )


def decayed(params):
    """Tree of bools: weight decay is for matrices alone, not for norms and embeddings."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def make_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW."""
    optimizer = config.optimizer
    return optax.chain(
        optax.clip_by_global_norm(optimizer.clip_norm),
        optax.adamw(
            make_schedule(config),
            b1=optimizer.b1,
            b2=optimizer.b2,
            weight_decay=optimizer.weight_decay,
            mask=decayed,
        ),
    )
