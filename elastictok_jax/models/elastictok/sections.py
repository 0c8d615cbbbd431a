"""ElasticTok's sections of the config, and the checks that look at several keys."""

import ml_collections

from elastictok_jax.config.schema import (
    POSITIVE,
    Key,
    Section,
    one_of,
)
from elastictok_jax.errors import UsageError
from elastictok_jax.models.autoencoder import LOSS, MASKING, autoencoder_block_tokens

MODEL: Section = {
    "width": Key(1024, "features of a token between layers", POSITIVE),
    "mlp_width": Key(2048, "hidden features of SwiGLU", POSITIVE),
    "encoder_layers": Key(10, "transformer layers of the encoder", POSITIVE),
    "decoder_layers": Key(10, "transformer layers of the decoder", POSITIVE),
    "heads": Key(8, "attention heads", POSITIVE),
    "patch": Key((1, 8, 8), "frames, height, width of a patch, which is a token"),
    "bottleneck": Key("fsq", "what a token may say", one_of("fsq", "vae")),
    "fsq_levels": Key((8, 8, 8, 5, 5, 5), "fsq: values of each dim"),
    "vae_dim": Key(8, "vae: dims of a token", POSITIVE),
    "rope_theta": Key(5e7, "base of the rotary embedding", POSITIVE),
    "norm_eps": Key(1e-5, "of RMSNorm", POSITIVE),
    "conditioned": Key(True, "the encoder sees which tokens will be kept"),
}
SECTIONS = {"model": MODEL, "masking": MASKING, "loss": LOSS}


def check(config: ml_collections.ConfigDict) -> None:
    """Raises UsageError, with the fix, where keys do not fit each other."""
    model = config.model
    if model.width % model.heads or (model.width // model.heads) % 2:
        raise UsageError(
            f"model.width = {model.width} over model.heads = {model.heads}: "
            "heads must divide width into even head widths (rotary pairs)"
        )
    if not model.fsq_levels or any(level < 2 for level in model.fsq_levels):
        raise UsageError(f"model.fsq_levels = {model.fsq_levels}: each must be at least 2")
    if len(model.patch) != 3 or min(model.patch) < 1:
        raise UsageError(
            f"model.patch = {model.patch}: must be three positive sizes, (frames, height, width)"
        )
    autoencoder_block_tokens(config, tuple(model.patch))
