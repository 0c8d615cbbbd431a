"""The paper's 200m FSQ model for benchmarks.train_step: 4 blocks of 4096 tokens, one clip a row.

Paper: ElasticTok, arXiv 2410.08368, table of sizes: width 1024, SwiGLU 2048, 10 + 10 layers.
Command: python -m benchmarks.train_step --experiment benchmarks/experiments/paper_200m.py
Hardware: one accelerator. XLA's plan for an H200 (141 GB), with model.attention=fused, in GiB of
    temporaries beside 2.4 of state: model.remat=none 21 at batch 1; dots 7.3 at 1, 55 at 8, 109 at
    16; attention 8.9 at 4, 34 at 16, 124 at 64. Not run there.
"""

from elastictok_jax.config import default_config


def get_config():
    """Defaults without LPIPS; `--config.loss.lpips_weight=0.1` adds it (AlexNet)."""
    config = default_config()
    config.loss.lpips_weight = 0.0
    config.loss.lpips_net = "alex"
    config.data.batch_size = 1
    return config
