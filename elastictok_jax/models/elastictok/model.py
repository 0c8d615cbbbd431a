"""The ElasticTok model: encoder, bottleneck and decoder (arXiv 2410.08368, section 3).

Dimension key: B batch, S tokens, D values a patch, W width, Z latent dims.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
from flax import struct

from elastictok_jax.layers.attention.api import SequenceLayout
from elastictok_jax.layers.bottlenecks import FSQ, VAE
from elastictok_jax.layers.scan_layout import stack_or_unstack
from elastictok_jax.layers.transformer import SMALL_INIT, LayerSpec, transformer_layers

Array = jax.Array


@struct.dataclass
class Output:
    """The result of a forward pass.

    Attributes:
      reconstruction: float32 [B, S, D] in (-1, 1).
      latents: float32 [B, S, Z], zero where dropped.
      codes: int32 [B, S] (FSQ) or float32 [B, S, Z] (VAE), of every token, kept or not.
      kl_BS: float32 [B, S] or None.
    """

    reconstruction: Array
    latents: Array
    codes: Array
    kl_BS: Array | None


class Encoder(nn.Module):
    """Maps patches to latents before the bottleneck."""

    spec: LayerSpec
    layers: int
    features: int
    conditioned: bool

    @nn.compact
    def __call__(self, patches_BSD: Array, keep_BS: Array, places: SequenceLayout) -> Array:
        spec = self.spec
        x_BSW = spec.linear(spec.width, axes=("patch", "embed"), name="in_proj")(patches_BSD)
        if self.conditioned:
            init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("embed",))
            kept_W: Any = self.param("kept_embed", init, (spec.width,))
            dropped_W: Any = self.param("dropped_embed", init, (spec.width,))
            x_BSW += jnp.where(keep_BS[..., None], kept_W, dropped_W).astype(spec.dtype)
        x_BSW = transformer_layers(self.layers, spec)(x_BSW, places)
        x_BSW = spec.norm("norm")(x_BSW)
        return spec.linear(self.features, axes=("embed", "latent"), name="out_proj")(x_BSW)


class Decoder(nn.Module):
    """Maps latents to pixels in (-1, 1)."""

    spec: LayerSpec
    layers: int
    features: int

    @nn.compact
    def __call__(self, latents_BSZ: Array, places: SequenceLayout) -> Array:
        spec = self.spec
        x_BSW = spec.linear(spec.width, axes=("latent", "embed"), name="in_proj")(latents_BSZ)
        x_BSW = transformer_layers(self.layers, spec)(x_BSW, places)
        x_BSW = spec.norm("norm")(x_BSW)
        x_BSD = spec.linear(
            self.features, axes=("embed", "patch"), name="out_proj", scale=SMALL_INIT
        )(x_BSW)
        x_BSD = nn.with_logical_constraint(x_BSD, ("batch", "sequence", None))
        return jnp.tanh(x_BSD.astype(jnp.float32))


class ElasticTok(nn.Module):
    """The autoencoder. Methods take patches in [-1, 1]; dropped latents are zero."""

    spec: LayerSpec
    encoder_layers: int
    decoder_layers: int
    patch_values: int
    conditioned: bool
    bottleneck: FSQ | VAE

    def setup(self) -> None:
        self.encoder = Encoder(
            self.spec, self.encoder_layers, self.bottleneck.encoder_dims, self.conditioned
        )
        self.decoder = Decoder(self.spec, self.decoder_layers, self.patch_values)

    def __call__(
        self,
        patches_BSD: Array,
        keep_BS: Array,
        places: SequenceLayout,
        noise_keys_B: Array | None = None,
    ) -> Output:
        """Encodes, drops tokens and decodes; `noise_keys_B` sample the latents of a VAE."""
        bottled = self.bottleneck(self.encoder(patches_BSD, keep_BS, places), noise_keys_B)
        latents_BSZ = jnp.where(keep_BS[..., None], bottled.latents, 0.0)
        return Output(
            reconstruction=self.decoder(latents_BSZ, places),
            latents=latents_BSZ,
            codes=bottled.codes,
            kl_BS=bottled.kl_BS,
        )

    def encode(self, patches_BSD: Array, keep_BS: Array, places: SequenceLayout) -> Array:
        """Returns the codes of every token: int32 [B, S] (FSQ) or float32 [B, S, Z] (VAE)."""
        return self.bottleneck(self.encoder(patches_BSD, keep_BS, places), None).codes

    def decode(self, codes: Array, keep_BS: Array, places: SequenceLayout) -> Array:
        """Returns the pixels [B, S, D] of stored codes, without tokens that are not kept."""
        latents_BSZ = jnp.where(keep_BS[..., None], self.bottleneck.dequantize(codes), 0.0)
        return self.decoder(latents_BSZ, places)


def build_elastictok_model(
    config: ml_collections.FrozenConfigDict | ml_collections.ConfigDict,
) -> ElasticTok:
    """Returns the model that a resolved config describes."""
    model, compute = config.model, config.compute
    spec = LayerSpec(
        width=model.width,
        mlp_width=model.mlp_width,
        heads=model.heads,
        rope_theta=model.rope_theta,
        norm_eps=model.norm_eps,
        attention=compute.attention,
        remat=compute.remat,
        mlp_chunk_tokens=compute.mlp_chunk_tokens,
        dtype=jnp.dtype(compute.dtype),
        scan_layers=compute.scan_layers,
    )
    pt, ph, pw = model.patch
    return ElasticTok(
        spec=spec,
        encoder_layers=model.encoder_layers,
        decoder_layers=model.decoder_layers,
        patch_values=pt * ph * pw * 3,
        conditioned=model.conditioned,
        bottleneck=FSQ(tuple(model.fsq_levels))
        if model.bottleneck == "fsq"
        else VAE(model.vae_dim),
    )


def init_elastictok_model(model: ElasticTok, key: Array):
    """Returns initial parameters, boxed with their logical axis names.

    Values do not depend on whether layers are stacked, nor sizes on the length of a sequence.
    """
    places = SequenceLayout(
        positions_S=jnp.zeros(1, jnp.int32),
        segments_BS=jnp.ones((1, 1), jnp.int32),
        tokens_per_block=1,
    )
    patches_BSD = jnp.zeros((1, 1, model.patch_values), jnp.float32)
    stacked = model.clone(spec=dataclasses.replace(model.spec, scan_layers=True))
    params = stacked.init(key, patches_BSD, jnp.ones((1, 1), bool), places)["params"]

    def unbox_layers(weight: nn.Partitioned) -> list[nn.Partitioned]:
        return [weight.replace(value=value, names=weight.names[1:]) for value in weight.value]

    return stack_or_unstack(
        params,
        stacked=model.spec.scan_layers,
        unstack=unbox_layers,
        is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned),
    )
