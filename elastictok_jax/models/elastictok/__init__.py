"""ElasticTok (arXiv 2410.08368): an autoencoder of blocks of frames with a variable token count."""

import ml_collections

from elastictok_jax.models.base import Family
from elastictok_jax.models.elastictok.sections import SECTIONS, check

__all__ = ["SECTIONS", "check", "family"]


def family(config: ml_collections.FrozenConfigDict) -> Family:
    """Returns the task and the codec of a resolved config."""
    from elastictok_jax.models.autoencoder import AutoencoderTask
    from elastictok_jax.models.elastictok.codec import ElasticTokCodec
    from elastictok_jax.models.elastictok.network import ElasticTokNetwork

    codec = ElasticTokCodec(config)
    return Family(AutoencoderTask(config, codec, ElasticTokNetwork(codec)), codec)
