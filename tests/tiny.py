"""The one tiny config of tests, and what tests make of a config."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elastictok_jax.config import apply_overrides, default_config, resolve_config
from elastictok_jax.data.pipeline import BatchReader
from elastictok_jax.models.registry import family_of_config
from elastictok_jax.parallel.mesh import make_mesh
from elastictok_jax.training import state, step

SIDE = 16  # pixels
TINY = {
    **{"model.width": 32, "model.mlp_width": 48, "model.heads": 2, "compute.dtype": "float32"},
    **{"model.encoder_layers": 1, "model.decoder_layers": 1, "model.patch": (2, 8, 8)},
    **{"video.resolution": SIDE, "masking.min_tokens": 1, "data.sequence_blocks": 3},
    "loss.lpips_net": "alex",
}


def tiny_config(**overrides: Any):
    """Returns a resolved config of 8 tokens a block; `__` stands for a dot in `overrides`."""
    config = default_config()
    apply_overrides(
        config, TINY | {key.replace("__", "."): value for key, value in overrides.items()}
    )
    return resolve_config(config)


def task_of(config):
    """Returns the task that a config describes."""
    return family_of_config(config).task


def codec_of(config):
    """Returns the codec that a config describes."""
    return family_of_config(config).codec


def mesh_of(config, devices=None):
    """Returns the checked mesh of a config."""
    return make_mesh(config, devices, check_model=task_of(config).check_mesh)


def made_up_state(config):
    """Returns a state at step 0 with weights from NumPy: real ones take seconds to compile.

    As in real ones, branches and the decoder end in small weights.
    """
    shapes = jax.eval_shape(lambda: state.init_state(task_of(config), config))
    rng = np.random.default_rng(config.seed)

    def weight(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("scale"):
            return jnp.ones(leaf.shape, leaf.dtype)
        is_end = name.endswith(("/out/kernel", "/down/kernel", "decoder/out_proj/kernel"))
        deviation = (0.1 if is_end else 1) / np.sqrt(np.prod(leaf.shape[:-1]))
        return jnp.asarray(deviation * rng.standard_normal(leaf.shape), leaf.dtype)

    params = jax.tree_util.tree_map_with_path(weight, shapes.params)
    return state.TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes.opt_state),
        ema_params=jax.tree.map(jnp.copy, {group: params[group] for group in shapes.ema_params}),
    )


def abstract_state(config, mesh):
    """Returns the shapes and shardings of a state."""
    return state.abstract_state(task_of(config), config, mesh)


def sharded_init(config, abstract):
    """Returns the state at step 0, placed as `abstract` says."""
    return state.init_state_sharded(task_of(config), config, abstract)


def make_train_step(config):
    """Returns the step of a config's task."""
    return step.make_train_step(task_of(config), config)


def jit_train_step(config, abstract):
    """Returns the step of a config's task as it is run."""
    return step.jit_train_step(task_of(config), config, abstract)


def abstract_params(config):
    """Returns the shapes of the model's parameters."""
    return codec_of(config).params_shapes()


def block_tokens(config) -> int:
    """Returns the tokens of a block."""
    return codec_of(config).geometry.tokens


def sequence_tokens(config) -> int:
    """Returns the tokens of a row."""
    return config.data.sequence_blocks * block_tokens(config)


def reader_of(config, splits, *, split: str, **options):
    """Returns the reader of a config's batches."""
    return BatchReader(config, splits, codec=codec_of(config), split=split, **options)
