"""Import of published ElasticTok checkpoints.

The file is a stream of msgpack pairs [key path, bytes], the bytes being one flax-serialised
array (msgpack extension 1 holding (shape, dtype name, row-major data), or flax's dict of
chunks when the array passes 2^30 bytes). A train state holds its weights under the prefix
('params', 'params') beside its optimizer state, which is passed over unread.

Sizes that the file claims are checked against the file before anything is allocated.
Shapes: D patch values, W width, M SwiGLU width, H heads, K = W/H, N layers.
"""

import json
import math
import os
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import msgpack
import numpy as np
from flax import traverse_util

from elastictok_jax import config as config_lib
from elastictok_jax.errors import UsageError
from elastictok_jax.interop import safetensors
from elastictok_jax.models import elastictok

Key = tuple[str, ...]
Shape = tuple[int, ...]

_AGAIN = "download the file again"
_DTYPES = {
    b"float32": np.dtype(np.float32),
    b"float16": np.dtype(np.float16),
    b"bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_NDARRAY_EXTENSION = 1
_BIN_LENGTHS = {0xC4: ">B", 0xC5: ">H", 0xC6: ">I"}  # msgpack bin 8, bin 16, bin 32
_MAX_KEY_BYTES = 16 * 1024
_MAX_KEY_PARTS = 32
_MAX_RANK = 8
_MAX_CHUNKS = 64  # one value holds < 2^32 bytes, a chunk 2^30
_NOT_WEIGHTS = ("opt_state", "step")  # the rest of a flax TrainState
_MSGPACK_ERRORS = (ValueError, TypeError, msgpack.UnpackException)

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


class _Entry(NamedTuple):
    """Where one weight lies: its key without 'params' prefixes, and its bytes."""

    key: Key
    offset: int
    length: int


class _Target(NamedTuple):
    """Where one published weight goes: our key, the layer (None = all), its published shape."""

    key: Key
    layer: int | None
    shape: Shape


def read_published(path: str | os.PathLike) -> Iterator[tuple[Key, np.ndarray]]:
    """Streams the weights of a published file, holding one array in memory at a time.

    Args:
      path: a `streaming_params` or `streaming_train_state` file.

    Yields:
      (key path without the 'params' prefix, read-only array in the stored dtype).

    Raises:
      UsageError: the file is missing, cut short, not such a stream, or holds an array that is
        not float32, float16 or bfloat16 of the size its shape says. Names file and key.
    """
    path = Path(path)
    with _open(path) as file:
        for entry in _entries(file, path=path):
            file.seek(entry.offset)
            yield entry.key, _decode_array(file.read(entry.length), key=entry.key, path=path)


def convert_config(published: dict[str, Any], *, conditioned: bool = True) -> dict[str, Any]:
    """Turns a published model's settings into overrides for our config.

    Args:
      published: the settings, keys as in tests/reference_parity/*/config.json.
      conditioned: whether the weights hold the kept / dropped vectors; the settings do not say.

    Returns:
      Dotted config key -> value.

    Raises:
      UsageError: lists every unknown, missing and ill-typed key, and block sizes that disagree.
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
        "video.frames_per_block": published["frames_per_block"],
        "video.resolution": published["resolution"],
        "masking.min_tokens": published["min_toks"],
        "data.sequence_blocks": published["max_sequence_length"] // published["max_toks"],
    }


def import_params(path: str | os.PathLike, *, abstract_params: dict[str, Any]) -> dict[str, Any]:
    """Reads a published file into our parameter tree.

    Args:
      path: a `streaming_params` or `streaming_train_state` file, its layers stacked or apart.
      abstract_params: our tree; leaves need only `.shape`.

    Returns:
      A tree like `abstract_params` of float32 numpy arrays.

    Raises:
      UsageError: the file cannot be read, or does not hold exactly these weights; one message
        names every missing, extra and mis-shaped weight with both shapes.
    """
    path = Path(path)
    shapes = {
        key: tuple(leaf.shape) for key, leaf in traverse_util.flatten_dict(abstract_params).items()
    }
    targets = _targets(shapes, found=_keys(path))
    params: dict[Key, np.ndarray] = {}
    problems: list[str] = []
    seen: set[Key] = set()
    for key, array in read_published(path):
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
    return traverse_util.unflatten_dict(params)


def import_published(
    file: str | os.PathLike, *, config_file: str | os.PathLike, output: str | os.PathLike
) -> None:
    """Writes the exported folder `output` (config.json, model.safetensors) of a published model.

    Args:
      file: a `streaming_params` or `streaming_train_state` file.
      config_file: its settings as JSON; see `convert_config`.
      output: a folder that does not exist yet or is empty.

    Raises:
      UsageError: an input cannot be read or does not fit the other, or `output` is in use.
        Nothing is written then.
    """
    file, output = Path(file), Path(output)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UsageError(f"{output} exists and is not an empty folder; name another one")
    published = _read_json(Path(config_file))
    conditioned = any(key[-1] == "is_kept_embed" for key in _keys(file))
    config = config_lib.default_config()
    config_lib.override(config, convert_config(published, conditioned=conditioned))
    config = config_lib.resolve(config)
    params = import_params(file, abstract_params=elastictok.abstract_params(config))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as staging:
            folder = Path(staging) / "model"
            folder.mkdir()
            safetensors.save_params(
                folder / "model.safetensors", params, metadata={"source": f"published {file.name}"}
            )
            (folder / "config.json").write_text(config_lib.to_json(config))
            os.replace(folder, output)  # whole or not at all
    except OSError as error:
        raise UsageError(f"cannot write {output}: {error}") from error


# The stream.


def _open(path: Path) -> BinaryIO:
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    try:
        return path.open("rb")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error}") from error


def _keys(path: Path) -> set[Key]:
    """Keys of the weights in the file, without reading the weights."""
    with _open(path) as file:
        return {entry.key for entry in _entries(file, path=path)}


def _entries(file: BinaryIO, *, path: Path) -> Iterator[_Entry]:
    """Finds each weight in the stream; leaves `file` anywhere."""
    size = os.fstat(file.fileno()).st_size
    if not size:
        raise UsageError(f"{path} is empty; {_AGAIN}")
    position = 0
    while position < size:
        key, offset, length = _read_header(file, position=position, size=size, path=path)
        position = offset + length
        if position > size:
            raise UsageError(
                f"{path}: cut short inside {'/'.join(key)}: it ends at byte {size}, "
                f"the value at byte {position}; {_AGAIN}"
            )
        if key[0] not in _NOT_WEIGHTS:
            yield _Entry(_without_prefix(key), offset, length)


def _read_header(file: BinaryIO, *, position: int, size: int, path: Path) -> tuple[Key, int, int]:
    """Reads one pair up to its value: (key, offset of the value's bytes, their number)."""
    file.seek(position)
    head = file.read(_MAX_KEY_BYTES)
    unpacker = msgpack.Unpacker(
        max_buffer_size=_MAX_KEY_BYTES, max_array_len=_MAX_KEY_PARTS, max_map_len=0
    )
    unpacker.feed(head)
    try:
        pair, key = unpacker.read_array_header(), unpacker.unpack()
    except _MSGPACK_ERRORS as error:
        raise _broken_header(path, position=position, size=size, error=error) from error
    if pair != 2 or not _is_key(key):
        raise UsageError(f"{path}: no pair of key path and value at byte {position}; {_AGAIN}")
    used = unpacker.tell()
    name = "/".join(key)
    code = head[used : used + 1]
    length_format = _BIN_LENGTHS.get(code[0]) if code else None
    if code and length_format is None:
        raise UsageError(
            f"{path}: the value of {name} is not bytes (msgpack code {code[0]:#x}); "
            "import a file in the published streaming format"
        )
    start = used + 1 + (struct.calcsize(length_format) if length_format else 0)
    if length_format is None or len(head) < start:
        raise UsageError(f"{path}: cut short after the key {name}; {_AGAIN}")
    (length,) = struct.unpack_from(length_format, head, used + 1)
    return tuple(key), position + start, length


def _broken_header(path: Path, *, position: int, size: int, error: Exception) -> UsageError:
    if isinstance(error, msgpack.OutOfData) and size - position < _MAX_KEY_BYTES:
        return UsageError(f"{path}: cut short inside the key at byte {position}; {_AGAIN}")
    return UsageError(
        f"{path}: not a published ElasticTok stream: no key path at byte {position}; "
        f"name a streaming_params or streaming_train_state file, or {_AGAIN}"
    )


def _is_key(key: object) -> bool:
    return (
        isinstance(key, list)
        and bool(key)
        and all(isinstance(part, str) and part and part.isprintable() for part in key)
    )


def _without_prefix(key: Key) -> Key:
    """Drops the one or two leading 'params' of a train state."""
    for _ in range(2):
        if len(key) > 1 and key[0] == "params":
            key = key[1:]
    return key


# One array.


def _decode_array(value: bytes, *, key: Key, path: Path) -> np.ndarray:
    """Decodes one flax-serialised array, whole or in chunks."""
    try:
        decoded = msgpack.unpackb(
            value, raw=False, max_array_len=_MAX_RANK, max_map_len=_MAX_CHUNKS
        )
        if isinstance(decoded, dict):
            return _join_chunks(decoded)
        return _array_from_extension(decoded)
    except _MSGPACK_ERRORS as error:
        reason = str(error) or type(error).__name__
        raise UsageError(
            f"{path}: {'/'.join(key)} is not a flax-serialised array: {reason}; {_AGAIN}"
        ) from error


def _array_from_extension(decoded: object) -> np.ndarray:
    """Raises ValueError for all but (shape, a dtype we know, as many bytes as these say)."""
    if not isinstance(decoded, msgpack.ExtType) or decoded.code != _NDARRAY_EXTENSION:
        raise ValueError(f"found {type(decoded).__name__}, not an array")
    fields = msgpack.unpackb(decoded.data, raw=True, max_array_len=_MAX_RANK, max_map_len=0)
    if not isinstance(fields, list) or len(fields) != 3:
        raise ValueError("found no (shape, dtype, data)")
    shape, dtype_name, data = fields
    _check_shape(shape)
    dtype = _DTYPES.get(dtype_name) if isinstance(dtype_name, bytes) else None
    if dtype is None:
        raise ValueError(f"dtype {dtype_name!r:.40} is not float32, float16 or bfloat16")
    if not isinstance(data, bytes) or len(data) != math.prod(shape) * dtype.itemsize:
        found = len(data) if isinstance(data, bytes) else "no"
        raise ValueError(f"shape {tuple(shape)} of {dtype} does not match {found} bytes of data")
    return np.frombuffer(data, dtype).reshape(shape)


def _join_chunks(decoded: dict) -> np.ndarray:
    """Joins flax's {'__msgpack_chunked_array__', 'shape': {'0': ..}, 'chunks': {'0': ..}}."""
    if decoded.get("__msgpack_chunked_array__") is not True:
        raise ValueError("found a dict that is not a chunked array")
    shape, chunks = _numbered(decoded.get("shape")), _numbered(decoded.get("chunks"))
    _check_shape(shape)
    arrays = [_array_from_extension(chunk) for chunk in chunks]
    if len({array.dtype for array in arrays}) != 1:
        raise ValueError("its chunks are none or of several dtypes")
    if any(array.ndim != 1 for array in arrays):
        raise ValueError("a chunk is not flat")
    if sum(array.size for array in arrays) != math.prod(shape):
        raise ValueError(f"shape {tuple(shape)} does not match the size of its chunks")
    return np.concatenate(arrays).reshape(shape)


def _numbered(items: object) -> list:
    """{'0': a, '1': b} -> [a, b]."""
    if not isinstance(items, dict) or set(items) != {str(i) for i in range(len(items))}:
        raise ValueError("its chunks or shape are not numbered from 0")
    return [items[str(i)] for i in range(len(items))]


def _check_shape(shape: object) -> None:
    if not isinstance(shape, list) or len(shape) > _MAX_RANK:
        raise ValueError(f"shape {shape!r:.80} is not a short list")
    if not all(map(_is_whole, shape)):
        raise ValueError(f"shape {shape!r:.80} holds something other than sizes")


# Names and shapes.


def _targets(shapes: dict[Key, Shape], *, found: set[Key]) -> dict[Key, _Target]:
    """Says for every weight our tree needs under which published key it should stand."""
    targets: dict[Key, _Target] = {}
    for key, shape in shapes.items():
        half, flat = key[0], _published_shape(key, shape=shape)
        if key[1] != "layers":
            name = _lookup(_PUBLISHED_PARTS, key=key, part=key)
            targets[name] = _Target(key, None, flat)
            continue
        blocks = (half, f"{half}_blocks")
        part = _lookup(_PUBLISHED_LAYER_PARTS, key=key, part=key[2:])
        if _layers_are_apart(found, blocks=blocks):
            for layer in range(shape[0]):
                targets[*blocks, str(layer), *part] = _Target(key, layer, flat[1:])
        else:
            targets[*blocks, "scan_decoder", *part] = _Target(key, None, flat)
    return targets


def _lookup(names: dict[str, str], *, key: Key, part: Key) -> Key:
    if "/".join(part) not in names:
        raise UsageError(
            f"published checkpoints hold nothing for {'/'.join(key)}; "
            "keep the model's layout as published"
        )
    return tuple(names["/".join(part)].split("/"))


def _layers_are_apart(found: set[Key], *, blocks: Key) -> bool:
    return any(key[:2] == blocks and len(key) > 2 and key[2].isdecimal() for key in found)


def _published_shape(key: Key, *, shape: Shape) -> Shape:
    """Our shape with heads merged, as published: [N, W, H, K] -> [N, W, W], and so on."""
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
    """Says where a block's tokens do not follow from its frames, resolution and patch."""
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
        problems.append(f"max_sequence_length {sequence} is no multiple of max_toks {max_toks}")
    return problems


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"cannot read {path} as JSON: {error}") from error
