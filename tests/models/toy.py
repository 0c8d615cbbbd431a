"""A linear patch autoencoder: the smallest model family, registered from outside the package."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from elastictok_jax.config.schema import POSITIVE, Key
from elastictok_jax.layers.codes import FloatCode
from elastictok_jax.layers.patching import patchify, unpatchify
from elastictok_jax.models import autoencoder
from elastictok_jax.models.base import Family
from elastictok_jax.pixels import pixels_to_float, pixels_to_uint8

PATCH = (2, 8, 8)  # frames, height, width
MODEL = {"dims": Key(8, "floats a token", POSITIVE)}
SECTIONS = {"model": MODEL, "masking": autoencoder.MASKING, "loss": autoencoder.LOSS}


def check(config):
    autoencoder.autoencoder_block_tokens(config, PATCH)


def family(config):
    toy = Toy(config)
    return Family(autoencoder.AutoencoderTask(config, toy, toy), toy)


@dataclasses.dataclass(frozen=True)
class Toy:
    config: ml_collections.FrozenConfigDict

    geometry = property(lambda self: autoencoder.autoencoder_geometry(self.config, PATCH))
    code = property(lambda self: FloatCode(self.config.model.dims))
    has_kl = knows_length = False  # codes are the same however many are kept

    def init(self, key):
        shape = (self.geometry.input_values, self.config.model.dims)
        kernel = nn.initializers.orthogonal()(key, shape)
        return {half: {"kernel": nn.Partitioned(kernel, (None, None))} for half in ("in", "out")}

    def __call__(self, params, inputs, keep, segments, noise_keys):
        codes = inputs @ params["in"]["kernel"]
        return autoencoder.Autoencoded(self.decoded(params, codes, keep), codes)

    def decoded(self, params, codes, keep):
        return jnp.where(keep[..., None], codes, 0) @ params["out"]["kernel"].T

    def encode_rows(self, params, inputs, keep, segments):
        return pixels_to_float(inputs) @ params["in"]["kernel"]

    def decode_rows(self, params, codes, keep, segments):
        return pixels_to_uint8(self.decoded(params, codes, keep))

    def start(self, *, window):
        return {}, {}  # of encoder and decoder: a block knows nothing of earlier ones

    def extend(self, past, present):
        return past

    def encode(self, params, inputs, keep, past):
        codes = self.encode_rows(params, inputs, keep, None)
        return jnp.broadcast_to(codes, (len(keep), *codes.shape)), {}

    def decode(self, params, codes, keep, past, key):
        return self.unpack(self.decode_rows(params, codes, keep, None)), {}

    def pack(self, frames, out=None):
        patches = patchify(frames, patch=PATCH, frames_per_block=self.geometry.frames)
        return patches if out is None else np.copyto(out, patches)

    def unpack(self, inputs):
        frames, side = self.geometry.frames, self.geometry.side
        return unpatchify(inputs, patch=PATCH, frames_per_block=frames, height=side, width=side)

    def params_shapes(self):
        return nn.meta.unbox(jax.eval_shape(self.init, jax.random.key(0)))

    def train_flops_per_row(self):
        return 3 * (self.flops_per_row("encode") + self.flops_per_row("decode"))

    def flops_per_row(self, half):
        geometry = self.geometry
        return 2.0 * geometry.row_inputs * geometry.input_values * self.config.model.dims

    def check_mesh(self, sizes, axis_names):
        pass  # the weights are replicated
