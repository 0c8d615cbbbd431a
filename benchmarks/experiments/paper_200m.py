"""The paper's 200m FSQ model for benchmarks.train_step: 4 blocks of 4096 tokens, one clip a row.

Paper: ElasticTok, arXiv 2410.08368, table of sizes: width 1024, SwiGLU 2048, 10 + 10 layers.
Command: python -m benchmarks.train_step --experiment benchmarks/experiments/paper_200m.py
Hardware: one accelerator; benchmarks/RESULTS.md has the memory that it takes on an H200.
"""

from elastictok_jax.config import default_config


def get_config():
    """Defaults without LPIPS; `--config.loss.lpips_weight=0.1` adds it (AlexNet)."""
    config = default_config()
    config.loss.lpips_weight = 0.0
    config.loss.lpips_net = "alex"
    config.data.batch_size = 1
    return config
