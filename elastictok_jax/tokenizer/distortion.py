"""What the error of a decoded block is measured by.

Dimension key: C candidates, L tokens a block, D patch values, F frames a block.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections

from elastictok_jax.layers.patching import to_float, unpatchify
from elastictok_jax.perceptual.lpips import lpips
from elastictok_jax.perceptual.lpips_weights import load_lpips

Array = jax.Array
# Errors float32 [C] of patches uint8 [C, L, D] against [L, D], where bool [L, D] is true.
Distortion = Callable[[Array, Array, Array], Array]


@jax.jit
def decoded_mse(pixels_CLD: Array, patches_LD: Array, inside_LD: Array) -> Array:
    """Mean squared error on the [-1, 1] scale: a `Distortion`."""
    error_CLD = (to_float(pixels_CLD) - to_float(patches_LD)) ** 2
    return jnp.sum(error_CLD * inside_LD, axis=(1, 2)) / jnp.sum(inside_LD, dtype=jnp.float32)


def lpips_distortion(config: ml_collections.ConfigDict) -> Distortion:
    """Mean LPIPS of a block's frames, padding and all, by the net `loss.lpips_net`.

    Raises:
      UsageError: if the weights of that net are not there.
    """
    params, net, side = (
        load_lpips(config.loss.lpips_net),
        config.loss.lpips_net,
        config.video.resolution,
    )
    sizes = dict(
        patch=tuple(config.model.patch),
        frames_per_block=config.video.frames_per_block,
        height=side,
        width=side,
    )

    @jax.jit
    def mean_lpips(pixels_CLD: Array, patches_LD: Array, inside_LD: Array) -> Array:
        del inside_LD
        count = pixels_CLD.shape[0]
        decoded, original = (
            unpatchify(to_float(x), **sizes) for x in (pixels_CLD, patches_LD[None])
        )
        original = jnp.broadcast_to(original, decoded.shape)
        frames = [x.reshape(-1, side, side, 3) for x in (decoded, original)]
        return lpips(params, *frames, net=net).reshape(count, -1).mean(axis=1)

    return mean_lpips
