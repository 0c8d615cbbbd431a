"""A small ElasticTok on real footage, from nothing to a report, on a laptop CPU.

Paper: ElasticTok, arXiv 2410.08368: FSQ, mask-conditioned encoder, uniform tail masking, here at
    64 px with 4-frame blocks of 128 tokens and 4 blocks a sequence.
Command: elastictok train quickstart --workdir runs/quickstart
Hardware: 2 CPU cores; the process holds about 1.1 GB.
Time: alone on 2 cores of an AMD EPYC virtual machine, `make quickstart` from nothing takes 3 min
    10 s: 28 s to install, 2 min 11 s for 1600 steps (0.07 to 0.08 s a step), 30 s of report. Other
    work beside it took a step to 0.23 s.
Result: of seed 0; other seeds differ. Held-out MSE with all tokens (eval/mse) 0.0405, from 0.343
    at the start, and with half of them 0.0403; at a target of 0.06 the kite takes 34 tokens a
    block, the city 120.
"""

from elastictok_jax.config import default_config


def get_config():
    """The embedded footage, a 1.1M-parameter model, MSE only."""
    config = default_config()
    config.model.width = 128
    config.model.mlp_width = 256
    config.model.encoder_layers = 3
    config.model.decoder_layers = 3
    config.model.heads = 2
    config.model.patch = (2, 8, 8)
    config.model.rope_theta = 1e4
    config.compute.dtype = "float32"
    config.compute.remat = "none"
    config.video.resolution = 64
    config.masking.min_tokens = 8
    config.loss.lpips_weight = 0.0  # LPIPS would take a good part of the time
    config.loss.lpips_net = "alex"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 150  # a faster start saturates the latents
    config.optimizer.final_fraction = 0.05
    config.optimizer.ema_decay = 0.99
    config.train.steps = 1600
    config.train.log_every = 50
    config.train.eval_every = 200
    config.train.checkpoint_every = 200
    config.data.batch_size = 2
    config.data.decode_threads = 2
    config.evaluation.batches = 8
    config.evaluation.targets = (0.04, 0.06, 0.1)
    config.evaluation.max_blocks = 8
    config.evaluation.search_blocks = 1
    config.evaluation.report = True
    return config
