"""Reconstruction error and KL over valid tokens.

Dimension key: B rows, S inputs of a row, T tokens of a row, D values of an input.
"""

import dataclasses

import jax
import jax.numpy as jnp

from elastictok_jax.losses.base import Reconstruction, Weight

Array = jax.Array


def squared_error_sum(reconstruction_BSD: Array, target_BSD: Array, valid_BS: Array) -> Array:
    """Returns the sum over valid inputs of the mean squared error of their pixels, float32."""
    error_BS = jnp.mean((reconstruction_BSD - target_BSD) ** 2, axis=-1)
    return jnp.sum(jnp.where(valid_BS, error_BS, 0.0))


@dataclasses.dataclass(frozen=True)
class SquaredError:
    """Mean squared error on the [-1, 1] scale over valid inputs."""

    weight: Weight = 1.0
    name = "mse"
    per = "tokens"

    def __call__(self, made: Reconstruction, *, frozen, keys) -> Array:
        del frozen, keys
        return squared_error_sum(made.decoded_BSD, made.target_BSD, made.segments_BS != 0)


@dataclasses.dataclass(frozen=True)
class KL:
    """KL to the unit Gaussian: sum over the kept tokens of a block, mean over blocks."""

    weight: Weight
    name = "kl"
    per = "blocks"

    def __call__(self, made: Reconstruction, *, frozen, keys) -> Array:
        del frozen, keys
        assert made.kl_BT is not None
        return jnp.sum(jnp.where(made.kept_BT, made.kl_BT, 0.0))
