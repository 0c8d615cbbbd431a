"""The toy family on the embedded footage.

Run: elastictok train tests/models/toy_experiment.py --workdir runs/toy
Hardware: any CPU, 10 s. Expected: eval/mse of 0.020 at full length: that of a linear code of 8
    floats for each patch of 2 frames of 8 x 8 pixels.
"""

from elastictok_jax.config import default_config


def get_config():
    config = default_config("toy")
    config.video.resolution = 64
    config.masking.min_tokens = 8
    config.loss.lpips_weight = 0.0
    config.data.batch_size = 2
    config.data.sequence_blocks = 4
    config.optimizer.learning_rate = 1e-2
    config.optimizer.warmup_steps = 20
    config.train.steps = 300
    config.train.log_every = 50
    config.train.eval_every = 100
    config.train.checkpoint_every = 100
    config.evaluation.targets = (0.05, 0.1)
    return config
