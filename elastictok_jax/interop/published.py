"""Imports published ElasticTok checkpoints into our parameters and config.

Shapes: D patch values, W width, M SwiGLU width, H heads, K = W/H, N layers.
"""

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util

from elastictok_jax import config as config_lib
from elastictok_jax.errors import UsageError
from elastictok_jax.interop.published_stream import (
    Key,
    published_stream_keys,
    read_published_stream,
)
from elastictok_jax.layers.scan_layout import is_stacked, relayout_shapes, stack_or_unstack
from elastictok_jax.models.registry import family_of_config
from elastictok_jax.storage import safetensors

Shape = tuple[int, ...]

_PUBLISHED_PARTS = {
    "encoder/in_proj/kernel": "encoder/in_proj/kernel",
    "encoder/kept_embed": "encoder/is_kept_embed",
    "encoder/dropped_embed": "encoder/is_masked_embed",
    "encoder/norm/scale": "encoder/ln_f/kernel",
    "encoder/out_proj/kernel": "encoder/pre_quant/kernel",
    "decoder/in_proj/kernel": "decoder/post_quant/kernel",
    "decoder/norm/scale": "decoder/ln_f/kernel",
    "decoder/out_proj/kernel": "decoder/out_proj/kernel",
}
_PUBLISHED_LAYER_PARTS = {
    "attention_norm/scale": "attention_norm/kernel",
    "attention/query/kernel": "attention/wq/kernel",
    "attention/key/kernel": "attention/wk/kernel",
    "attention/value/kernel": "attention/wv/kernel",
    "attention/out/kernel": "attention/wo/kernel",
    "mlp_norm/scale": "ffn_norm/kernel",
    "mlp/gate/kernel": "feed_forward/w1/kernel",
    "mlp/up/kernel": "feed_forward/w3/kernel",
    "mlp/down/kernel": "feed_forward/w2/kernel",
}


class _Target(NamedTuple):
    """The destination of a published weight: our key, the layer (None = all), published shape."""

    key: Key
    layer: int | None
    shape: Shape


def convert_config(published: dict[str, Any], *, conditioned: bool = True) -> dict[str, Any]:
    """Converts a published model's settings to overrides of our config.

    Args:
      published: the settings, with keys as in tests/reference_parity/*/config.json.
      conditioned: whether the weights hold the kept / dropped vectors, which the settings do not
        state.

    Returns:
      Dotted config key -> value.

    Raises:
      UsageError: lists every unknown, missing and ill-typed key, and inconsistent block sizes.
    """
    if not isinstance(published, dict):
        raise UsageError("the published config must be a JSON object of settings")
    problems = [f"unknown key {key}" for key in published if key not in _CHECKS]
    for key, (check, kind) in _CHECKS.items():
        if key not in published:
            problems.append(f"missing key {key} ({kind})")
        elif not check(published[key]):
            problems.append(f"{key} must be {kind}, not {published[key]!r:.80}")
    if not problems:
        problems = _block_problems(published)
    if problems:
        raise UsageError("published config: " + "; ".join(problems))
    return {
        "model.width": published["hidden_size"],
        "model.mlp_width": published["intermediate_size"],
        "model.encoder_layers": published["num_encoder_layers"],
        "model.decoder_layers": published["num_decoder_layers"],
        "model.heads": published["num_attention_heads"],
        "model.patch": tuple(published["patch_size"]),
        "model.bottleneck": published["bottleneck_type"],
        "model.fsq_levels": tuple(published["fsq_quant_levels"]),
        "model.vae_dim": published["vae_bottleneck_dim"],
        "model.rope_theta": float(published["theta"]),
        "model.norm_eps": float(published["rms_norm_eps"]),
        "model.conditioned": conditioned,
        "compute.dtype": "float32",  # as for the published figures
        "video.frames_per_block": published["frames_per_block"],
        "video.resolution": published["resolution"],
        "masking.min_tokens": published["min_toks"],
        "data.sequence_blocks": published["max_sequence_length"] // published["max_toks"],
    }


def import_params(path: str | os.PathLike, *, abstract_params: dict[str, Any]) -> dict[str, Any]:
    """Reads a published file into our parameter tree.

    Args:
      path: a `streaming_params` or `streaming_train_state` file, with stacked or separate layers.
      abstract_params: our tree, with stacked or separate layers; leaves only need `.shape`.

    Returns:
      A tree like `abstract_params` of float32 numpy arrays.

    Raises:
      UsageError: if the file cannot be read, or does not hold exactly these weights; one message
        names every missing, extra and mis-shaped weight with both shapes.
    """
    path = Path(path)
    structs = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, "f4"), abstract_params)
    stacked = relayout_shapes(structs, stacked=True)
    shapes = {key: leaf.shape for key, leaf in traverse_util.flatten_dict(stacked).items()}
    targets = _targets(shapes, found=published_stream_keys(path))
    params: dict[Key, np.ndarray] = {}
    problems: list[str] = []
    seen: set[Key] = set()
    for key, array in read_published_stream(path):
        name = "/".join(key)
        target = targets.get(key)
        if key in seen:
            problems.append(f"{name} occurs twice")
        elif target is None:
            problems.append(f"extra {name} {array.shape}")
        elif array.shape != target.shape:
            problems.append(
                f"{name} has shape {array.shape}, but {_our_name(target)} needs {target.shape}"
            )
        elif target.layer is None:
            params[target.key] = array.astype(np.float32).reshape(shapes[target.key])
        else:
            shape = shapes[target.key]
            stacked = params.setdefault(target.key, np.empty(shape, np.float32))
            stacked[target.layer] = array.reshape(shape[1:])
        seen.add(key)
    problems += [
        f"missing {'/'.join(key)} {target.shape} for {_our_name(target)}"
        for key, target in targets.items()
        if key not in seen
    ]
    if problems:
        raise UsageError(
            f"{path}: the weights do not fit the config: {'; '.join(problems)}. "
            "Use the config that was published with this file"
        )
    return stack_or_unstack(
        traverse_util.unflatten_dict(params), stacked=is_stacked(abstract_params)
    )


def import_published(
    file: str | os.PathLike, *, config_file: str | os.PathLike, output: str | os.PathLike
) -> None:
    """Exports a published model to the folder `output` (config.json, model.safetensors).

    Args:
      file: a `streaming_params` or `streaming_train_state` file.
      config_file: its settings as JSON; see `convert_config`.
      output: a folder that does not exist yet or is empty.

    Raises:
      UsageError: if an input cannot be read, the inputs do not match, or `output` is in use;
        nothing is written then.
    """
    file, output = Path(file), Path(output)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UsageError(f"{output} exists and is not an empty folder; name another one")
    published = _read_json(Path(config_file))
    conditioned = any(key[-1] == "is_kept_embed" for key in published_stream_keys(file))
    config = config_lib.default_config()
    config_lib.apply_overrides(config, convert_config(published, conditioned=conditioned))
    config = config_lib.resolve_config(config)
    params = import_params(file, abstract_params=family_of_config(config).codec.params_shapes())
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as staging:
            folder = Path(staging) / "model"
            folder.mkdir()
            safetensors.save_safetensors(
                folder / "model.safetensors", params, metadata={"source": f"published {file.name}"}
            )
            (folder / "config.json").write_text(config_lib.config_to_json(config))
            os.replace(folder, output)  # atomic
    except OSError as error:
        raise UsageError(f"cannot write {output}: {error}") from error


# Names and shapes.


def _targets(shapes: dict[Key, Shape], *, found: set[Key]) -> dict[Key, _Target]:
    """Maps the published key of every weight that our tree needs to its destination."""
    targets: dict[Key, _Target] = {}
    for key, shape in shapes.items():
        half, flat = key[0], _published_shape(key, shape=shape)
        if key[1] != "layers":
            name = _lookup(_PUBLISHED_PARTS, key=key, part=key)
            targets[name] = _Target(key, None, flat)
            continue
        blocks = (half, f"{half}_blocks")
        part = _lookup(_PUBLISHED_LAYER_PARTS, key=key, part=key[2:])
        if _layers_are_separate(found, blocks=blocks):
            for layer in range(shape[0]):
                targets[*blocks, str(layer), *part] = _Target(key, layer, flat[1:])
        else:
            targets[*blocks, "scan_decoder", *part] = _Target(key, None, flat)
    return targets


def _lookup(names: dict[str, str], *, key: Key, part: Key) -> Key:
    if "/".join(part) not in names:
        raise UsageError(
            f"published checkpoints have no weight for {'/'.join(key)}; "
            "keep the published model layout"
        )
    return tuple(names["/".join(part)].split("/"))


def _layers_are_separate(found: set[Key], *, blocks: Key) -> bool:
    return any(key[:2] == blocks and len(key) > 2 and key[2].isdecimal() for key in found)


def _published_shape(key: Key, *, shape: Shape) -> Shape:
    """Merges the heads of our shape, as published: [N, W, H, K] -> [N, W, W], and so on."""
    if key[-2] in ("query", "key", "value"):
        return (*shape[:-2], math.prod(shape[-2:]))
    if key[-3:-1] == ("attention", "out"):
        return (shape[0], math.prod(shape[1:3]), shape[3])
    if key[-1] in ("kept_embed", "dropped_embed"):
        return (1, *shape)
    return shape


def _our_name(target: _Target) -> str:
    name = "/".join(target.key)
    return name if target.layer is None else f"{name}[{target.layer}]"


# The config.


def _is_whole(value: object, *, at_least: int = 1) -> bool:
    if isinstance(value, bool) or not isinstance(value, int):
        return False
    return at_least <= value < 2**31


def _is_positive(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 < value < 2**63  # neither nan nor inf


def _is_patch(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) == 3 and all(map(_is_whole, value))


def _is_levels(value: object) -> bool:
    return (
        isinstance(value, list | tuple)
        and bool(value)
        and all(_is_whole(level, at_least=2) for level in value)
    )


_WHOLE = (_is_whole, "a whole number above 0")
_POSITIVE = (_is_positive, "a number above 0")
_CHECKS = {
    "min_toks": _WHOLE,
    "max_toks": _WHOLE,
    "frames_per_block": _WHOLE,
    "patch_size": (_is_patch, "three whole numbers above 0: frames, rows, columns"),
    "bottleneck_type": (lambda value: value in ("fsq", "vae"), "'fsq' or 'vae'"),
    "fsq_quant_levels": (_is_levels, "a list of whole numbers above 1"),
    "vae_bottleneck_dim": _WHOLE,
    "hidden_size": _WHOLE,
    "intermediate_size": _WHOLE,
    "num_encoder_layers": _WHOLE,
    "num_decoder_layers": _WHOLE,
    "num_attention_heads": _WHOLE,
    "max_sequence_length": _WHOLE,
    "theta": _POSITIVE,
    "rms_norm_eps": _POSITIVE,
    "scan_layers": (lambda value: isinstance(value, bool), "true or false"),
    "resolution": _WHOLE,
}


def _block_problems(published: dict[str, Any]) -> list[str]:
    """Lists inconsistencies between a block's tokens and its frames, resolution and patch."""
    frames, side = published["frames_per_block"], published["resolution"]
    sizes = list(zip((frames, side, side), published["patch_size"], strict=True))
    max_toks, sequence = published["max_toks"], published["max_sequence_length"]
    problems = []
    if any(size % patch for size, patch in sizes):
        problems.append(
            f"patch_size {published['patch_size']} does not divide {frames} frames of {side}x{side}"
        )
    tokens = math.prod(size // patch for size, patch in sizes)
    if tokens != max_toks:
        problems.append(
            f"max_toks is {max_toks}, but frames_per_block, resolution and patch_size "
            f"give {tokens} tokens a block"
        )
    if published["min_toks"] > max_toks:
        problems.append(f"min_toks {published['min_toks']} is above max_toks {max_toks}")
    if sequence % max_toks:
        problems.append(f"max_sequence_length {sequence} is not a multiple of max_toks {max_toks}")
    return problems


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"cannot read {path} as JSON: {error}") from error
