"""A small ElasticTok on real footage, from nothing to a report, on a laptop CPU.

Paper: ElasticTok, arXiv 2410.08368; FSQ model, conditioned encoder, uniform tail masking.
"""

from elastictok_jax.config import default_config


def get_config():
    """64 px, 4-frame blocks of 128 tokens, 4 blocks a sequence."""
    config = default_config()
    config.model.width = 192
    config.model.mlp_width = 384
    config.model.encoder_layers = 4
    config.model.decoder_layers = 4
    config.model.heads = 2
    config.model.patch = (2, 8, 8)
    config.model.rope_theta = 1e4
    config.model.dtype = "float32"
    config.model.remat = "none"
    config.video.resolution = 64
    config.masking.min_tokens = 8
    config.loss.lpips_weight = 0.0
    config.loss.lpips_net = "alex"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.ema_decay = 0.999
    config.train.steps = 1500
    config.train.log_every = 50
    config.train.eval_every = 250
    config.train.checkpoint_every = 250
    config.data.batch_size = 4
    config.data.decode_threads = 2
    config.evaluation.report = True
    return config
