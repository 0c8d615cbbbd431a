"""The paper's 200M FSQ model, from images to a million tokens of video in five stages.

Paper: ElasticTok, arXiv 2410.08368, sections 3 and 4: FSQ of 64,000 codes, 4-frame blocks of 256
    px, 256 to 4096 tokens a block, images first and then longer and longer video. Learning rate,
    weight decay and frames a second are those of the published training script; the batch of 2^20
    tokens, the steps of each stage and the share of images in video stages are ours.
Command: elastictok fetch-weights lpips-vgg
    elastictok prepare IMAGES -o data/images
    elastictok prepare VIDEOS -o data/videos
    elastictok train elastictok_fsq:stage=image --workdir runs/fsq-image
    elastictok train elastictok_fsq:stage=video --workdir runs/fsq-video \\
        --config.train.init_from=runs/fsq-image
    and so on with stage=64k, stage=512k and stage=1m, each from the stage before it; data and
    runs lie on a disk that all hosts share (--config.data.sources.videos.path=... for another).
Hardware: TPU v4-512: 256 chips, `--topology v4:8x8x4`. On another pod give its mesh, and see first
    whether it fits: elastictok compile elastictok_fsq:stage=1m --topology v5p:8x8x4
Time: predicted, not measured: at best 42 ms a step of stage=image, bound by arithmetic, 2.3 hours
    for its steps; 3.5 s a step of stage=1m, bound by the interconnect, 5 hours (libtpu 0.0.42).
    For any stage: elastictok compile elastictok_fsq:stage=STAGE --topology v4:8x8x4
Result: not measured here. The paper's are 3.5x and 1.3x fewer tokens than a fixed tokenizer on
    images at a loose and a strict target, and 5x and 2.4x on video (figure 4).
"""

from elastictok_jax.config import default_config, default_source_config
from elastictok_jax.errors import UsageError

# Stage: blocks a sequence, and steps. A device of a v4-512 holds one block of 4096 tokens.
STAGES = {
    "image": (1, 200_000),
    "video": (4, 100_000),
    "64k": (16, 20_000),
    "512k": (128, 10_000),
    "1m": (256, 5_000),
}
BATCH_BLOCKS = 256


def get_config(arg="stage=image"):
    """`stage=` image, video, 64k, 512k or 1m: 4096 tokens and more to 2^20 a sequence."""
    stage = arg.removeprefix("stage=")
    if stage not in STAGES or stage == arg:
        raise UsageError(f"elastictok_fsq:{arg}: give elastictok_fsq:stage={'|'.join(STAGES)}")
    blocks, steps = STAGES[stage]
    config = default_config()  # the model is the default one
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_steps = steps // 100
    config.train.steps = steps
    config.train.eval_every = config.train.checkpoint_every = min(1000, steps // 20)
    config.data.sequence_blocks = blocks
    config.data.batch_size = BATCH_BLOCKS // blocks
    config.data.workers = 16
    config.data.sources = dict(images=default_source_config(path="data/images", kind="image"))
    if stage != "image":
        config.data.sources.images.weight = 0.1
        config.data.sources.videos = default_source_config(
            path="data/videos", kind="video", weight=0.9, fps=4.0
        )
    config.mesh.data, config.mesh.fsdp, config.mesh.sequence = 1, -1, blocks
    return config
