"""The study's elastic tokenizer: mask-conditioned, any number of tokens (docs/study.md).

Paper: ElasticTok, arXiv 2410.08368, sections 3 and 4; the quick start's model with continuous
    latents (VAE), 64 px and 128 tokens a block, on images and video of `benchmarks/fetch_data.sh`.
Command: elastictok train study_elastic --workdir runs/study/elastic-0 --config.seed=0
    --config.train.init_from=runs/study/base-0 (a study_fixed:share=1.0 of 500 steps)
    (all of the study: python -m benchmarks.study)
Hardware: 2 CPU cores.
Time: 4 min of training on 2 cores of an AMD EPYC.
Result: 0.538 of video blocks under MSE 0.03, as many as fixed50; all figures in docs/study.md.
"""

from elastictok_jax.config import default_source_config
from elastictok_jax.experiment_registry import get_experiment

DATA = "data/study/train"


def get_config():
    """The quick start's model with continuous latents, which need fewer steps than FSQ's, on the
    study's training split; an eighth of the blocks are still images."""
    config = get_experiment("quickstart")
    config.model.bottleneck = "vae"
    config.train.steps = 1000
    config.train.eval_every = 500
    config.train.checkpoint_every = 500
    config.evaluation.report = False
    config.evaluation.max_blocks = 12
    config.evaluation.targets = (0.02, 0.03, 0.045, 0.07)
    config.data.sources = dict(
        images=default_source_config(path=DATA, kind="image", weight=0.125, resolution=96),
        video=default_source_config(path=DATA, kind="video", weight=0.875, resolution=72),
    )
    config.data.eval_fraction = 0.05  # for the curves of training; the study has its own split
    return config
