"""Images and video mixed, in two stages: first images alone, then video with images among it.

Paper: ElasticTok, arXiv 2410.08368, section 3.3: training starts on images and goes on with
    longer and longer video. Here the quick start's model, on the footage in the package.
Command: elastictok train mixture:stage=images --workdir runs/mixture-images
    elastictok train mixture:stage=video --workdir runs/mixture-video \\
        --config.train.init_from=runs/mixture-images
Hardware: 2 CPU cores.
Time: 53 s for the images and 1 min 57 s for the video on 2 cores of an AMD EPYC.
Result: of one run (seed 0), held-out MSE with all tokens (eval/mse) 0.054 after the images, and
    0.039 after the video.
"""

from elastictok_jax.config import default_source_config
from elastictok_jax.errors import UsageError
from elastictok_jax.experiment_registry import get_experiment


def get_config(arg="stage=images"):
    """`stage=images`, or `stage=video`: twice the context, a quarter of the blocks still images."""
    config = get_experiment("quickstart")
    config.evaluation.report = False
    config.train.steps = 400
    images = default_source_config(path="embedded", kind="image", resolution=80)  # crops have room
    if arg == "stage=images":
        config.data.sources = dict(images=images)
    elif arg == "stage=video":
        config.data.sequence_blocks *= 2
        images.weight = 0.25
        config.data.sources = dict(
            images=images,
            clips=default_source_config(path="embedded", kind="video", weight=0.5),
            generated=default_source_config(path="synthetic", kind="video", weight=0.25, fps=12.0),
        )
    else:
        raise UsageError(f"mixture:{arg}: give mixture:stage=images or mixture:stage=video")
    return config
