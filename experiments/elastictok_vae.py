"""The paper's 200M VAE model, from images to 512K tokens of video in four stages.

Paper: ElasticTok, arXiv 2410.08368, sections 3 and 4: 8 continuous values a token, KL weight 1e-8,
    4-frame blocks of 256 px in patches of 2 frames, 128 to 2048 tokens a block. Stages, batch and
    optimizer are those of `elastictok_fsq`; at half the tokens a block, twice the blocks.
Command: elastictok fetch-weights lpips-vgg
    elastictok prepare IMAGES -o data/images
    elastictok prepare VIDEOS -o data/videos
    elastictok train elastictok_vae:stage=image --workdir runs/vae-image
    elastictok train elastictok_vae:stage=video --workdir runs/vae-video \\
        --config.train.init_from=runs/vae-image
    and so on with stage=64k and stage=512k, each from the stage before it; data and
    runs lie on a disk that all hosts share (--config.data.sources.videos.path=... for another).
Hardware: TPU v4-512: 256 chips, `--topology v4:8x8x4`.
Time: not measured. `elastictok compile elastictok_vae:stage=STAGE --topology v4:8x8x4` predicts it.
Result: not measured here; the paper's are those that `elastictok_fsq` names.
"""

from elastictok_jax.errors import UsageError
from elastictok_jax.experiment_registry import get_experiment

STAGES = ("image", "video", "64k", "512k")


def get_config(arg="stage=image"):
    """`stage=` image, video, 64k or 512k: 2048 tokens and more to 2^19 a sequence."""
    stage = arg.removeprefix("stage=")
    if stage not in STAGES or stage == arg:
        raise UsageError(
            f"elastictok_vae:{arg}: give elastictok_vae:stage={'|'.join(STAGES)} (the paper's VAE "
            "goes up to 512K tokens; elastictok_fsq has stage=1m)"
        )
    config = get_experiment(f"elastictok_fsq:{arg}")
    config.model.bottleneck = "vae"
    config.model.patch = (2, 8, 8)
    config.model.rope_theta = 5e6
    config.masking.min_tokens = 128
    if stage == "image":
        config.data.batch_size *= 2
    else:
        config.data.sequence_blocks *= 2
    return config
