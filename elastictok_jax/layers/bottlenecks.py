"""Bottlenecks between encoder and decoder: FSQ or a diagonal Gaussian (paper, section 3.2).

Dimension key: B batch, S tokens, Z latent dims. Neither has parameters.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from elastictok_jax.layers.codes import FloatCode, FSQCode

Array = jax.Array


@struct.dataclass
class Quantized:
    """The result of a bottleneck.

    Attributes:
      latents: float32 [B, S, Z], the input of the decoder.
      codes: int32 [B, S] (FSQ) or float32 [B, S, Z] (VAE mean), to be stored.
      kl_BS: float32 [B, S], KL to the unit Gaussian summed over Z; None for FSQ.
    """

    latents: Array
    codes: Array
    kl_BS: Array | None


@dataclasses.dataclass(frozen=True)
class FSQ:
    """Finite scalar quantisation (Mentzer et al. 2023, arXiv 2309.15505).

    Each dim is squashed to `levels[i]` integer steps and rounded with a straight-through gradient.
    """

    levels: tuple[int, ...]
    edge: float = 1e-3

    has_kl = False

    @property
    def encoder_dims(self) -> int:
        return len(self.levels)

    @property
    def code(self) -> FSQCode:
        return FSQCode(self.levels)

    def __call__(self, x_BSZ: Array, noise_keys_B: Array | None) -> Quantized:
        """Quantises the encoder's output, without noise."""
        del noise_keys_B
        levels = np.asarray(self.levels)
        x_BSZ = x_BSZ.astype(jnp.float32)
        half = (levels - 1) * (1 - self.edge) / 2
        offset = np.where(levels % 2 == 0, 0.5, 0.0)  # an even number of steps straddles zero
        shift = np.tan(offset / half)
        bounded = jnp.tanh(x_BSZ + shift) * half - offset
        rounded = bounded + jax.lax.stop_gradient(jnp.round(bounded) - bounded)
        latents = rounded / (levels // 2)
        return Quantized(latents=latents, codes=self.encode_digits(jnp.round(bounded)), kl_BS=None)

    def encode_digits(self, steps_BSZ: Array) -> Array:
        """Converts integer steps around zero to one mixed-radix index per token, dim 0 fastest."""
        levels = np.asarray(self.levels)
        digits = steps_BSZ.astype(jnp.int32) + levels // 2
        return jnp.sum(digits * np.cumprod([1, *self.levels[:-1]]), axis=-1, dtype=jnp.int32)

    def dequantize(self, codes_BS: Array) -> Array:
        """Returns the latents float32 [B, S, Z] that gave codes int32 [B, S], exactly."""
        return self.code.values(codes_BS)


@dataclasses.dataclass(frozen=True)
class VAE:
    """Diagonal Gaussian with the reparameterisation trick; codes are the mean."""

    dims: int

    has_kl = True

    @property
    def encoder_dims(self) -> int:
        return 2 * self.dims  # mean, then log-variance

    @property
    def code(self) -> FloatCode:
        return FloatCode(self.dims)

    def __call__(self, x_BSZ: Array, noise_keys_B: Array | None) -> Quantized:
        """Samples each row with its own key; without keys, latents are the mean."""
        mean, log_variance = jnp.split(x_BSZ.astype(jnp.float32), 2, axis=-1)
        log_variance = jnp.clip(log_variance, -30.0, 20.0)  # exp stays finite in float32
        kl_BS = 0.5 * jnp.sum(mean**2 + jnp.exp(log_variance) - 1.0 - log_variance, axis=-1)
        latents = mean
        if noise_keys_B is not None:
            noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(noise_keys_B)
            latents = mean + jnp.exp(0.5 * log_variance) * noise
        return Quantized(latents=latents, codes=mean, kl_BS=kl_BS)

    def dequantize(self, codes_BSZ: Array) -> Array:
        """Returns the codes, which are the latents."""
        return codes_BSZ
