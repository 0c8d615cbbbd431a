"""The study's elastic tokenizer whose encoder does not know how many tokens are kept.

Paper: ElasticTok, arXiv 2410.08368, Table 5: encoded once, whatever the length.
Command: elastictok train study_unconditioned --workdir runs/study/unconditioned-0 --config.seed=0
    --config.train.init_from=runs/study/base-0 (a study_fixed:share=1.0 of 500 steps)
Hardware: 2 CPU cores.
Time: 4 min of training on 2 cores of an AMD EPYC.
Result: 0.525 of video blocks under MSE 0.03 (conditioned: 0.538); all figures in docs/study.md.
"""

from elastictok_jax.experiment_registry import get_experiment


def get_config():
    """`study_elastic` but for the encoder."""
    config = get_experiment("study_elastic")
    config.model.conditioned = False
    config.train.init_from_mismatch = "reinitialise"  # what the base is conditioned by falls away
    return config
