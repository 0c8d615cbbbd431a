"""The study's baselines: tokenizers of a fixed number of tokens.

Paper: ElasticTok, arXiv 2410.08368, section 4: each is trained for one share of all tokens.
Command: elastictok train study_fixed:share=0.5 --workdir runs/study/fixed50-0 --config.seed=0
    --config.train.init_from=runs/study/base-0 (itself study_fixed:share=1.0 of 500 steps)
Hardware: 2 CPU cores.
Time: 4 min of training on 2 cores of an AMD EPYC.
Result: share=0.5 brings 0.525 of video blocks under MSE 0.03; all figures in docs/study.md.
"""

import re

from elastictok_jax.errors import UsageError
from elastictok_jax.experiment_registry import get_experiment


def get_config(arg="share=0.5"):
    """`study_elastic` with the same number of tokens for every block."""
    share = re.fullmatch(r"share=(0?\.\d+|1(?:\.0*)?)", arg)
    if not share:
        raise UsageError(f"study_fixed:{arg}: give a share of all tokens, study_fixed:share=0.25")
    config = get_experiment("study_elastic")
    config.masking.kind = "fixed"
    config.masking.fraction = float(share[1])
    return config
