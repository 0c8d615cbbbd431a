"""A tokenizer with random weights, small enough to compile in a second, and real footage for it."""

from elastictok_jax import ElasticTokenizer
from elastictok_jax.config import apply_overrides, default_config, resolve_config
from elastictok_jax.data import media
from elastictok_jax.data.sources.file_source import EMBEDDED
from tests.tiny import made_up_state

LENGTH, SIDE = 8, 16  # tokens a block, pixels
SMALL = {
    **{"model.width": 32, "model.mlp_width": 48, "model.heads": 2, "compute.dtype": "float32"},
    **{"model.encoder_layers": 1, "model.decoder_layers": 1, "model.patch": (2, 8, 8)},
    **{"video.resolution": SIDE, "masking.min_tokens": 1, "data.sequence_blocks": 3},
    "loss.lpips_net": "alex",
}


def make_tokenizer(**overrides):
    config = default_config()
    apply_overrides(config, SMALL | overrides)
    config = resolve_config(config)
    return ElasticTokenizer(config, made_up_state(config).params["model"])


def moving_clip(*, frames):
    clip = media.read_frames(EMBEDDED / "heldout" / "bbb_stream.mp4", count=frames)
    return media.center_crop(media.resize_shortest(clip, side=SIDE), height=SIDE, width=SIDE)
