"""Errors of decoded blocks, which lengths are chosen by.

Dimension key: C candidates, F frames a block, H height, W width.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections

from elastictok_jax.perceptual.lpips import lpips
from elastictok_jax.perceptual.lpips_weights import load_lpips
from elastictok_jax.pixels import pixels_to_float

Array = jax.Array
# Returns errors float32 [C] of frames uint8 [C, F, H, W, 3] against uint8 [F, H, W, 3], where
# bool [F, H, W, 3] is true.
Distortion = Callable[[Array, Array, Array], Array]


@jax.jit
def decoded_mse(decoded_CFHWC: Array, original_FHWC: Array, inside_FHWC: Array) -> Array:
    """Returns the mean squared error on the [-1, 1] scale: a `Distortion`."""
    error_CFHWC = (pixels_to_float(decoded_CFHWC) - pixels_to_float(original_FHWC)) ** 2
    sums_C = jnp.sum(error_CFHWC * inside_FHWC, axis=(1, 2, 3, 4))
    return sums_C / jnp.sum(inside_FHWC, dtype=jnp.float32)


def lpips_distortion(config: ml_collections.ConfigDict) -> Distortion:
    """Returns the mean LPIPS of a block's frames, padding included, by the net `loss.lpips_net`.

    Raises:
      UsageError: if the weights of that net have not been fetched.
    """
    net = config.loss.lpips_net
    params = load_lpips(net)

    @jax.jit
    def mean_lpips(decoded_CFHWC: Array, original_FHWC: Array, inside_FHWC: Array) -> Array:
        del inside_FHWC
        decoded = pixels_to_float(decoded_CFHWC)
        original = jnp.broadcast_to(pixels_to_float(original_FHWC), decoded.shape)
        frames = [x.reshape(-1, *x.shape[2:]) for x in (decoded, original)]
        return lpips(params, *frames, net=net).reshape(len(decoded), -1).mean(axis=1)

    return mean_lpips
