"""Configuration: defaults, derived values, and validation with messages that say the mend."""

import difflib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_collections

from elastictok_jax import masking
from elastictok_jax.errors import UsageError
from elastictok_jax.layers.attention.api import BACKENDS
from elastictok_jax.layers.patching import tokens_per_block
from elastictok_jax.layers.transformer import REMAT_POLICIES

CHOICES = {
    "model.bottleneck": ("fsq", "vae"),
    "model.attention": BACKENDS,
    "model.remat": tuple(REMAT_POLICIES),
    "model.dtype": ("float32", "bfloat16"),
    "masking.kind": masking.MASKINGS,
    "loss.lpips_net": ("alex", "vgg"),
    "optimizer.schedule": ("cosine", "constant"),
    "data.packing": ("mixed", "by_source"),
    "train.init_from_mismatch": ("refuse", "reinitialise"),
}
SOURCE = r"data\.sources\.(\w+)\."  # what the keys of one source start with
SOURCE_CHOICES = {"kind": ("any", "image", "video"), "crop": ("random", "center")}
POSITIVE = (
    *("train.steps", "train.log_every", "train.eval_every", "train.checkpoint_every"),
    *("train.keep_last", "data.batch_size", "data.sequence_blocks", "model.width"),
    *("model.mlp_width", "model.encoder_layers", "model.decoder_layers", "model.heads"),
    *("model.vae_dim", "model.rope_theta", "video.frames_per_block", "video.resolution"),
    *("optimizer.learning_rate", "optimizer.clip_norm", "optimizer.accumulate_steps"),
    *("masking.min_tokens", "masking.deviation", "evaluation.batches", "data.decode_threads"),
    *(
        "evaluation.max_blocks",
        "evaluation.max_clips",
        "data.prefetch",
        "model.norm_eps",
        "data.packing_rows",
    ),
    "data.timeout_seconds",
    "loss.lpips_every_blocks",
)
NOT_NEGATIVE = (
    *("loss.lpips_weight", "loss.kl_weight", "optimizer.weight_decay", "optimizer.warmup_steps"),
    *("train.keep_best", "train.step_timeout", "train.pause_timeout", "data.cache_mib", "seed"),
    *("masking.mean", "data.workers", "model.mlp_chunk_tokens", "evaluation.search_blocks"),
)
RANGES: tuple[tuple[Callable[[float], bool], str, tuple[str, ...]], ...] = (
    (lambda x: x > 0, "greater than 0", POSITIVE),
    (lambda x: x >= 0, "0 or more", NOT_NEGATIVE),
    (lambda x: 0 <= x <= 1, "in [0, 1]", ("data.max_bad_fraction", "optimizer.final_fraction")),
    (lambda x: 0 < x <= 1, "in (0, 1]", ("masking.fraction", "evaluation.max_cost")),
    (
        lambda x: 0 <= x < 1,
        "in [0, 1)",
        ("optimizer.b1", "optimizer.b2", "optimizer.ema_decay", "data.eval_fraction"),
    ),
)


def default_config() -> ml_collections.ConfigDict:
    """The paper's 200m FSQ model at 256 px with settings that every experiment starts from."""
    config = ml_collections.ConfigDict()
    config.name = "default"
    config.seed = 0

    config.model = model = ml_collections.ConfigDict()
    model.width = 1024
    model.mlp_width = 2048
    model.encoder_layers = 10
    model.decoder_layers = 10
    model.heads = 8
    model.patch = (1, 8, 8)  # frames, height, width
    model.bottleneck = "fsq"
    model.fsq_levels = (8, 8, 8, 5, 5, 5)
    model.vae_dim = 8
    model.rope_theta = 5e7
    model.norm_eps = 1e-5
    model.conditioned = True  # the encoder sees which tokens will be kept
    model.attention = "auto"
    model.remat = "dots"
    model.mlp_chunk_tokens = 0  # feed-forward: most tokens a device at once; 0 for all
    model.dtype = "bfloat16"  # of the computation; parameters are float32
    model.scan_layers = True  # one program for all layers of a half; False: one each

    config.video = ml_collections.ConfigDict(dict(frames_per_block=4, resolution=256))

    config.masking = ml_collections.ConfigDict()
    config.masking.kind = "uniform"
    config.masking.min_tokens = 256
    config.masking.fraction = 0.5  # "fixed": share of a block's tokens
    config.masking.mean = 0.5  # "truncated_normal": shares of a block's tokens
    config.masking.deviation = 0.25

    config.loss = ml_collections.ConfigDict()
    config.loss.lpips_weight = 0.1
    config.loss.lpips_net = "vgg"
    config.loss.lpips_every_blocks = 1  # LPIPS looks at one frame of as many blocks of a row
    config.loss.kl_weight = 1e-8

    config.optimizer = optimizer = ml_collections.ConfigDict()
    optimizer.learning_rate = 1e-4
    optimizer.warmup_steps = 2000
    optimizer.schedule = "cosine"
    optimizer.final_fraction = 0.1  # cosine: last learning rate over the highest
    optimizer.b1 = 0.9
    optimizer.b2 = 0.95
    optimizer.weight_decay = 1e-4
    optimizer.clip_norm = 1.0
    optimizer.accumulate_steps = 1  # microbatches that a batch is cut into
    optimizer.ema_decay = 0.0  # 0: no average of the weights is kept

    config.train = train = ml_collections.ConfigDict()
    train.steps = 200_000
    train.log_every = 50
    train.eval_every = 2000
    train.checkpoint_every = 1000
    train.keep_last = 2
    train.keep_best = 1
    train.best_metric = "eval/mse"  # lowest; of one that counts blocks met, highest
    train.tensorboard = False
    train.wandb_project = ""  # empty: no wandb
    train.step_timeout = 900.0  # seconds without a step after which the run ends; 0: never
    train.pause_timeout = 7200.0  # the same for a first step, an evaluation, a checkpoint
    train.init_from = ""  # a workdir or exported folder whose weights a new run starts with
    train.init_from_mismatch = "refuse"  # or "reinitialise" what it lacks or has otherwise

    config.data = data = ml_collections.ConfigDict()
    data.sources = ml_collections.ConfigDict({"main": source_config(path="embedded")})
    data.packing = "mixed"  # or "by_source": no row mixes sources
    data.packing_rows = 64  # rows packed together: more make fewer cuts, and longer plans
    data.eval_fraction = 0.1  # share that is held out, chosen by the names of the originals
    data.max_bad_fraction = 0.1  # share of damaged data above which a run stops
    data.batch_size = 8
    data.sequence_blocks = 4
    data.workers = 0  # processes that read batches; 0: threads of this one
    data.decode_threads = 4  # in each process
    data.prefetch = 4  # batches, in each process
    data.cache_mib = 1024  # of decoded frames kept in memory, for sources that fit wholly
    data.timeout_seconds = 600.0  # without a batch: the run stops

    config.evaluation = evaluation = ml_collections.ConfigDict()
    evaluation.batches = 4  # held-out batches each train.eval_every steps
    evaluation.max_cost = 0.25  # of the training's operations: fewer batches, if need be
    evaluation.targets = (0.003, 0.007, 0.015)  # MSE on the [-1, 1] scale (paper, section 4)
    evaluation.max_blocks = 16  # of each held-out clip in the report
    evaluation.max_clips = 64  # videos, and images, of each source in the report
    evaluation.search_blocks = 0  # of each clip in the report that every search codes: slow
    evaluation.report = False  # write reports/ when training ends

    # One of each row may be -1: what is left. An axis has the product of its two sizes.
    config.mesh = mesh = ml_collections.ConfigDict(dict(data=-1, fsdp=1, tensor=1, sequence=1))
    mesh.update(dict(dcn_data=1, dcn_fsdp=1, dcn_tensor=1, dcn_sequence=1))  # slices along each
    return config


def source_config(**settings: Any) -> ml_collections.ConfigDict:
    """A source of images and videos, an entry of `data.sources`; `settings` replace defaults."""
    source = ml_collections.ConfigDict()
    source.path = ""  # a prepared or other TFDS data set, a folder, a glob, embedded, synthetic
    source.weight = 1.0  # its share of the blocks trained on, over the sum of all weights
    source.kind = "any"  # or only its "image" or "video" items
    source.split = "train"  # of a TFDS data set
    source.heldout_split = ""  # of a TFDS data set; empty: data.eval_fraction of `split`
    source.resolution = 0  # shortest side before the crop; 0: video.resolution
    source.fps = 0.0  # frames a second at most; 0: as recorded
    source.crop = "random"  # or "center"; held-out data is always cropped at the centre
    source.flip = True
    source.sequences = 4  # longer videos are cut into stretches of this many sequences
    source.update(settings)
    return source


def block_tokens(config: ml_collections.ConfigDict) -> int:
    """L, tokens a block at the training resolution."""
    side = config.video.resolution
    patch = tuple(config.model.patch)
    return tokens_per_block(config.video.frames_per_block, side, side, patch=patch)


def patch_values(config: ml_collections.ConfigDict) -> int:
    """D, values a patch."""
    return 3 * math.prod(config.model.patch)


def sequence_tokens(config: ml_collections.ConfigDict) -> int:
    """S, tokens a sequence."""
    return config.data.sequence_blocks * block_tokens(config)


def override(config: ml_collections.ConfigDict, overrides: dict[str, Any]) -> None:
    """Sets dotted keys in place, as `--config.KEY=VALUE` does; values take the default's type.

    A key of a source that is not there yet adds that source.

    Raises:
      UsageError: on a key that does not exist, naming the nearest, or a value of another type.
    """
    for key in overrides:
        named = re.match(SOURCE, key)
        if named and named[1] not in config.data.sources:
            config.data.sources[named[1]] = source_config()
    known = flatten(config)
    for key, value in overrides.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            mend = f"did you mean {near[0]}?" if near else f"keys are {', '.join(sorted(known))}"
            raise UsageError(f"unknown config key {key}: {mend}")
        config.update_from_flattened_dict({key: parse_value(key, value, like=known[key])})


def parse_value(key: str, value: Any, *, like: Any) -> Any:
    """`value` (often a string) as the type of `like`."""
    kind = type(like)
    try:
        if isinstance(like, tuple):
            items = value.strip("()[] ").split(",") if isinstance(value, str) else value
            return tuple(_parse_scalar(item, type(like[0])) for item in items if str(item).strip())
        return _parse_scalar(value, kind)
    except (KeyError, TypeError, ValueError):
        raise UsageError(
            f"config key {key}: {value!r} is not {kind.__name__} (now {like!r})"
        ) from None


def _parse_scalar(value: Any, kind: type) -> Any:
    """`value` as a bool, int, float or str; raises KeyError, TypeError or ValueError."""
    if kind is bool:
        return {"true": True, "1": True, "false": False, "0": False}[str(value).lower()]
    if kind is int and isinstance(value, float) and not value.is_integer():
        raise ValueError(value)  # int() would cut it in silence
    return kind(value)


def flatten(config: ml_collections.ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Nested config as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _check_model(model: ml_collections.ConfigDict) -> None:
    """Raises UsageError where sizes of the model do not fit each other."""
    if model.width % model.heads or (model.width // model.heads) % 2:
        raise UsageError(
            f"model.width = {model.width} over model.heads = {model.heads}: "
            "heads must divide width into even head widths (rotary pairs)"
        )
    if not model.fsq_levels or any(level < 2 for level in model.fsq_levels):
        raise UsageError(f"model.fsq_levels = {model.fsq_levels}: each must be at least 2")
    if len(model.patch) != 3 or min(model.patch) < 1:
        raise UsageError(
            f"model.patch = {model.patch}: must be three positive sizes, (frames, height, width)"
        )


def _check_sources(config: ml_collections.ConfigDict) -> None:
    """Raises UsageError where a source lacks a path or has a bad setting."""
    sources, side = config.data.sources, config.video.resolution
    for name, source in sources.items():
        key = f"data.sources.{name}"
        if not source.path:
            raise UsageError(
                f"{key}.path is empty: give a prepared data set, a folder, a glob, embedded or "
                f"synthetic (the sources are {', '.join(sources)})"
            )
        for field, allowed in SOURCE_CHOICES.items():
            if source[field] not in allowed:
                raise UsageError(
                    f"{key}.{field} = {source[field]!r}: choose one of {', '.join(allowed)}"
                )
        if source.weight < 0 or source.fps < 0 or source.sequences < 1:
            raise UsageError(f"{key}: weight and fps must be 0 or more, sequences at least 1")
        if source.resolution and source.resolution < side:
            raise UsageError(
                f"{key}.resolution = {source.resolution} is less than video.resolution = {side}: "
                "raise it, or give 0"
            )
    if not any(source.weight for source in sources.values()):
        raise UsageError("data.sources: no source has a weight above 0, so there is no data")


def resolve(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """A validated, frozen-key copy.

    Raises:
      UsageError: names the key, its value, and the mend.
    """
    config = ml_collections.ConfigDict(config.to_dict()).copy_and_resolve_references()
    config.lock()
    flat = flatten(config)
    for key, allowed in CHOICES.items():
        if flat[key] not in allowed:
            raise UsageError(f"{key} = {flat[key]!r}: choose one of {', '.join(allowed)}")
    for inside, words, keys in RANGES:
        for key in keys:
            if not inside(flat[key]):
                raise UsageError(f"{key} = {flat[key]!r}: must be {words}")
    _check_model(config.model)
    _check_sources(config)
    try:
        per_block = block_tokens(config)
    except ValueError as error:
        raise UsageError(
            f"{error}: choose video.resolution and video.frames_per_block as multiples "
            f"of model.patch = {tuple(config.model.patch)}"
        ) from None
    if config.masking.min_tokens > per_block:
        raise UsageError(
            f"masking.min_tokens = {config.masking.min_tokens} is more than the {per_block} "
            "tokens of a block: lower it"
        )
    if config.masking.kind == "powers_of_two" and not len(
        masking.powers_of_two(config.masking.min_tokens, per_block)
    ):
        raise UsageError(
            f"masking.kind = powers_of_two: no power of two in [{config.masking.min_tokens}, "
            f"{per_block}]: lower masking.min_tokens"
        )
    targets = config.evaluation.targets
    if not targets or not all(target > 0 for target in targets):
        raise UsageError(f"evaluation.targets = {targets}: give errors above 0, e.g. 0.003,0.015")
    if config.data.batch_size % config.optimizer.accumulate_steps:
        raise UsageError(
            f"data.batch_size = {config.data.batch_size} is not a multiple of "
            f"optimizer.accumulate_steps = {config.optimizer.accumulate_steps}"
        )
    return config


def to_json(config: ml_collections.ConfigDict) -> str:
    """Sorted JSON text of a config, the same text for the same config."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def read_config(path: Path) -> ml_collections.ConfigDict:
    """The resolved config in a `config.json`; keys it lacks take their default.

    Raises:
      UsageError: if the file is missing, is not JSON, or has unknown keys or bad values.
    """
    try:
        loaded = json.loads(path.read_text())
    except FileNotFoundError:
        raise UsageError(
            f"{path} is missing: give a training workdir or an exported model"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is damaged ({error}): restore it from a copy") from None
    if not isinstance(loaded, dict):
        raise UsageError(f"{path} is damaged (not a JSON object): restore it from a copy")
    config = default_config()
    values = flatten(ml_collections.ConfigDict(loaded))
    if any(re.match(SOURCE, key) for key in values):
        config.data.sources = ml_collections.ConfigDict()  # those that the file names, and no more
    override(config, values)
    return resolve(config)
