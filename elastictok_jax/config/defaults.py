"""The config sections that every experiment has; those of a model family are in its module.

Each line is a key: default, meaning, constraint.
"""

from typing import Any

import ml_collections

from elastictok_jax.config.schema import (
    BELOW_ONE,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    POSITIVE_FRACTION,
    Key,
    Section,
    one_of,
    schema_defaults,
)
from elastictok_jax.layers.attention.api import BACKENDS
from elastictok_jax.layers.transformer import REMAT_POLICIES
from elastictok_jax.models.registry import DEFAULT_FAMILY, family_module

TOP: Section = {
    "name": Key("default", "name of the experiment, set when it is loaded"),
    "seed": Key(0, "of weights, masks, noise and the order of data", NOT_NEGATIVE),
}
COMPUTE: Section = {
    "attention": Key("auto", "attention backend", one_of(*BACKENDS)),
    "remat": Key("dots", "what the forward pass keeps for the backward", one_of(*REMAT_POLICIES)),
    "mlp_chunk_tokens": Key(0, "feed-forward: most tokens a device at once; 0: all", NOT_NEGATIVE),
    "dtype": Key("bfloat16", "of activations; weights are float32", one_of("float32", "bfloat16")),
    "scan_layers": Key(True, "one program for all layers of a stack; false: one each"),
}
VIDEO: Section = {
    "frames_per_block": Key(4, "frames of a block", POSITIVE),
    "resolution": Key(256, "height and width of frames, pixels", POSITIVE),
}
OPTIMIZER: Section = {
    "learning_rate": Key(1e-4, "peak learning rate of AdamW", POSITIVE),
    "warmup_steps": Key(2000, "linear warm-up", NOT_NEGATIVE),
    "schedule": Key("cosine", "after the warm-up", one_of("cosine", "constant")),
    "final_fraction": Key(0.1, "cosine: last learning rate over the peak", FRACTION),
    "b1": Key(0.9, "AdamW's first decay rate", BELOW_ONE),
    "b2": Key(0.95, "AdamW's second decay rate", BELOW_ONE),
    "weight_decay": Key(1e-4, "of matrices; norms and embeddings have none", NOT_NEGATIVE),
    "clip_norm": Key(1.0, "global norm that gradients are clipped to", POSITIVE),
    "accumulate_steps": Key(1, "microbatches that a batch is cut into", POSITIVE),
    "ema_decay": Key(0.0, "of the average of the weights; 0: no average is kept", BELOW_ONE),
}
TRAIN: Section = {
    "steps": Key(200_000, "optimizer updates", POSITIVE),
    "log_every": Key(50, "steps between lines of metrics", POSITIVE),
    "eval_every": Key(2000, "steps between evaluations on held-out data", POSITIVE),
    "checkpoint_every": Key(1000, "steps between checkpoints", POSITIVE),
    "keep_last": Key(2, "newest checkpoints that are kept", POSITIVE),
    "keep_best": Key(1, "best checkpoints that are kept", NOT_NEGATIVE),
    "best_metric": Key("eval/mse", "metric of evaluations by which checkpoints are compared"),
    "tensorboard": Key(False, "write TensorBoard events"),
    "wandb_project": Key("", "wandb project; empty: no wandb"),
    "step_timeout": Key(900.0, "seconds without a step that end a run; 0: never", NOT_NEGATIVE),
    "pause_timeout": Key(
        7200.0, "the same for a first step, an evaluation, a checkpoint", NOT_NEGATIVE
    ),
    "init_from": Key("", "workdir or exported folder whose weights a new run starts with"),
    "init_from_mismatch": Key(
        "refuse", "weights that init_from lacks", one_of("refuse", "reinitialise")
    ),
}
DATA: Section = {
    "packing": Key("mixed", "by_source: no row mixes sources", one_of("mixed", "by_source")),
    "packing_rows": Key(64, "rows packed together: more make fewer cuts", POSITIVE),
    "eval_fraction": Key(0.1, "fraction held out, chosen by names of originals", BELOW_ONE),
    "max_bad_fraction": Key(0.1, "fraction of damaged data above which a run stops", FRACTION),
    "batch_size": Key(8, "rows of a global batch", POSITIVE),
    "sequence_blocks": Key(4, "blocks of a row, the context", POSITIVE),
    "workers": Key(0, "processes that read batches; 0: threads of this one", NOT_NEGATIVE),
    "decode_threads": Key(4, "threads that decode, in each process", POSITIVE),
    "prefetch": Key(4, "batches read ahead, in each process", POSITIVE),
    "cache_mib": Key(1024, "decoded frames kept in memory, of sources that fit", NOT_NEGATIVE),
    "timeout_seconds": Key(600.0, "without a batch: the run stops", POSITIVE),
}
SOURCE: Section = {
    "path": Key("", "a TFDS data set, a folder, a glob, embedded, synthetic"),
    "weight": Key(1.0, "fraction of the blocks trained on, over the sum of weights", NOT_NEGATIVE),
    "kind": Key("any", "which items are used", one_of("any", "image", "video")),
    "split": Key("train", "of a TFDS data set"),
    "heldout_split": Key("", "of a TFDS data set; empty: data.eval_fraction of `split`"),
    "resolution": Key(0, "shortest side before the crop; 0: video.resolution"),
    "fps": Key(0.0, "frames a second at most; 0: as recorded", NOT_NEGATIVE),
    "crop": Key(
        "random", "of training; held-out data is cropped at the centre", one_of("random", "center")
    ),
    "flip": Key(True, "mirror half of the clips"),
    "sequences": Key(4, "longer videos are cut into stretches of this many rows", POSITIVE),
}
EVALUATION: Section = {
    "batches": Key(4, "held-out batches of an evaluation", POSITIVE),
    "max_cost": Key(0.25, "fraction of the training's operations at most", POSITIVE_FRACTION),
    "targets": Key((0.003, 0.007, 0.015), "MSE on the [-1, 1] scale (paper, section 4)"),
    "max_blocks": Key(16, "of each held-out clip in the report", POSITIVE),
    "max_clips": Key(64, "videos, and images, of each source in the report", POSITIVE),
    "search_blocks": Key(0, "of each clip that every search codes: slow", NOT_NEGATIVE),
    "report": Key(False, "write reports/ when training ends"),
}
MESH: Section = {
    "data": Key(-1, "devices over rows; one axis may be -1: the rest"),
    "fsdp": Key(1, "devices over rows and weights"),
    "tensor": Key(1, "devices over heads and feed-forward width"),
    "sequence": Key(1, "devices over the tokens of a row: ring attention"),
    "dcn_data": Key(1, "slices along data, over the data-center network"),
    "dcn_fsdp": Key(1, "slices along fsdp"),
    "dcn_tensor": Key(1, "slices along tensor"),
    "dcn_sequence": Key(1, "slices along sequence"),
}
COMMON: dict[str, Section] = {
    "compute": COMPUTE,
    "video": VIDEO,
    "optimizer": OPTIMIZER,
    "train": TRAIN,
    "data": DATA,
    "evaluation": EVALUATION,
    "mesh": MESH,
}


def default_sections(family: str) -> dict[str, Section]:
    """Returns all sections of an experiment with a model of `family`, by name."""
    own = family_module(family).SECTIONS
    model = {"family": Key(family, "model family"), **own["model"]}
    return {**own, "model": model, **COMMON}


def default_config(family: str = DEFAULT_FAMILY) -> ml_collections.ConfigDict:
    """Returns the settings that every experiment starts from: the defaults of all sections.

    Of ElasticTok, that is the paper's 200m FSQ model at 256 px.
    """
    config = ml_collections.ConfigDict(schema_defaults(TOP))
    for name, section in default_sections(family).items():
        config[name] = ml_collections.ConfigDict(schema_defaults(section))
    config.data.sources = ml_collections.ConfigDict(
        {"main": default_source_config(path="embedded")}
    )
    return config


def default_source_config(**settings: Any) -> ml_collections.ConfigDict:
    """Returns a source of images and videos, an entry of `data.sources`, with these settings."""
    source = ml_collections.ConfigDict(schema_defaults(SOURCE))
    source.update(settings)
    return source
