"""ElasticTok's sections of the config, and the checks that look at several keys."""

import ml_collections

from elastictok_jax import masking
from elastictok_jax.config.schema import (
    NOT_NEGATIVE,
    POSITIVE,
    POSITIVE_FRACTION,
    Key,
    Section,
    one_of,
)
from elastictok_jax.errors import UsageError
from elastictok_jax.layers.patching import tokens_per_block

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
MASKING: Section = {
    "kind": Key("uniform", "distribution of the tokens kept", one_of(*masking.MASKINGS)),
    "min_tokens": Key(256, "fewest tokens that a block keeps", POSITIVE),
    "fraction": Key(0.5, "fixed: fraction of a block's tokens", POSITIVE_FRACTION),
    "mean": Key(0.5, "truncated_normal: fraction of a block's tokens", NOT_NEGATIVE),
    "deviation": Key(0.25, "truncated_normal: fraction of a block's tokens", POSITIVE),
}
LOSS: Section = {
    "lpips_weight": Key(
        0.1, "weight of LPIPS; 0: none, and its weights are not read", NOT_NEGATIVE
    ),
    "lpips_ramp_steps": Key(
        0, "steps over which that weight grows from 0; 0: at once", NOT_NEGATIVE
    ),
    "lpips_net": Key("vgg", "network of LPIPS", one_of("alex", "vgg")),
    "lpips_every_blocks": Key(1, "LPIPS looks at one frame of this many blocks", POSITIVE),
    "kl_weight": Key(1e-8, "vae: weight of the KL", NOT_NEGATIVE),
}
SECTIONS = {"model": MODEL, "masking": MASKING, "loss": LOSS}


def check(config: ml_collections.ConfigDict) -> None:
    """Raises UsageError, with the fix, where keys do not fit each other."""
    model, video = config.model, config.video
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
    try:
        per_block = tokens_per_block(
            video.frames_per_block, video.resolution, video.resolution, patch=tuple(model.patch)
        )
    except ValueError as error:
        raise UsageError(
            f"{error}: choose video.resolution and video.frames_per_block as multiples "
            f"of model.patch = {tuple(model.patch)}"
        ) from None
    fewest = config.masking.min_tokens
    if fewest > per_block:
        raise UsageError(
            f"masking.min_tokens = {fewest} is more than the {per_block} tokens of a block: "
            "lower it"
        )
    if config.masking.kind == "powers_of_two" and not len(masking.powers_of_two(fewest, per_block)):
        raise UsageError(
            f"masking.kind = powers_of_two: no power of two in [{fewest}, {per_block}]: "
            "lower masking.min_tokens"
        )
