"""The .etok file format: a safetensors file with metadata about the clip and a checksum.

Dimension key: N blocks, S tokens of all blocks, Z latent dims, W words of the entropy coder.

Arrays: `codes` (the smallest unsigned type [S] of an FSQ, float32 [S, Z] of a VAE), or instead
`words` (uint32 [W], `entropy`); `lengths` (the smallest unsigned type [N]), `mse` (float32 [N]),
`met` (bool [N]). Files are untrusted: their sizes are checked against limits, and their shapes
against each other, before memory is allocated for them.
"""

import json
import math
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from elastictok_jax.errors import UsageError
from elastictok_jax.storage.atomic import replacing
from elastictok_jax.tokenizer import entropy
from elastictok_jax.tokenizer.block_codes import BlockCodes, block_code_lengths

FORMAT = "etok-2"
CODINGS = ("plain", "entropy")
MAX_TOKENS = 2**25  # per file: 8,192 blocks of 4,096
MAX_PIXELS = 2**36  # frames x height x width: 10 hours of 256 x 256 at 30 frames a second
MAX_FRAME_PIXELS = 2**26  # all tiles of a frame are decoded together
MAX_FILE_BYTES = 2**31
MAX_HEADER_BYTES = 2**14  # ours take well under 1,024

# Metadata stored as JSON.
_TEXT = ("bits_per_token", "fps", "frames", "height", "levels", "width", "window_blocks")
_UNSIGNED = ("U8", "U16", "U32")


def write_etok_fields(path: str | Path, fields: Mapping[str, Any], *, coding: str) -> None:
    """Writes the fields of `Tokens` atomically; see `Tokens.save`."""
    if coding not in CODINGS:
        raise UsageError(f"coding {coding!r}: choose one of {', '.join(CODINGS)}")
    try:
        _check_fields(fields)
    except (ValueError, TypeError) as error:
        raise UsageError(f"{path} cannot be written: these tokens are unsound: {error}") from None
    codes, levels = fields["codes"], fields["levels"]
    lengths = block_code_lengths(codes)
    arrays = {"lengths": _smallest(lengths), "mse": fields["mse"], "met": fields["met"]}
    if coding == "plain":
        flat = BlockCodes.of(codes).flat
        arrays["codes"] = _smallest(flat) if flat.ndim == 1 else flat
    elif codes[0].ndim == 1:
        arrays["words"] = entropy.entropy_encode(codes, levels=levels)
    else:
        raise UsageError(f"{path}: VAE codes have no entropy-coded form: use coding='plain'")
    text = {name: json.dumps(fields[name]) for name in _TEXT}
    text |= {"format": FORMAT, "coding": coding, "fingerprint": fields["fingerprint"]}
    data = save(arrays, metadata=text | {"crc32": etok_checksum(arrays, text)})
    if len(data) > MAX_FILE_BYTES:
        raise UsageError(
            f"{path} would have {len(data)} bytes, more than the limit of {MAX_FILE_BYTES}: "
            "save the clip in pieces"
        )
    try:
        with replacing(Path(path)) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error}): choose another place") from None


def read_etok_fields(path: str | Path) -> dict[str, Any]:
    """Reads the fields of `Tokens` from an .etok file; see `Tokens.load`."""
    if not Path(path).is_file():
        raise UsageError(f"{path} does not exist: give an .etok file")
    try:
        _require_size(path)
        with safe_open(str(path), framework="numpy") as file:
            text = _read_text(file.metadata() or {})
            arrays = _read_arrays(file, coding=text["coding"])
        if text.pop("crc32") != etok_checksum(arrays, text):
            raise ValueError("its content does not match its checksum")
        clip = {name: json.loads(text[name]) for name in _TEXT}
        clip |= {"levels": tuple(clip["levels"]), "fingerprint": text["fingerprint"]}
        _check_clip(clip)
        clip |= {name: float(clip[name]) for name in ("fps", "bits_per_token")}
        return _with_blocks(clip, arrays)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error}): give a readable .etok file") from None
    except (SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise UsageError(f"{path} is damaged ({str(error)[:200]}): encode it again") from None


def _check_fields(fields: Mapping[str, Any]) -> None:
    """Raises ValueError if the fields of `Tokens` are inconsistent or exceed this module's limits.

    Both `save` and `load` enforce it.
    """
    _check_clip(fields)
    codes, levels = fields["codes"], fields["levels"]
    if not len(codes):
        raise ValueError("there are no blocks")
    _check_blocks(fields["mse"], fields["met"], lengths=block_code_lengths(codes))
    if not isinstance(codes, BlockCodes):
        if len({(code.dtype, code.shape[1:]) for code in codes}) != 1:
            raise ValueError("blocks have codes of several types")
        codes = BlockCodes.of(codes)
    flat = codes.flat
    dtype, tail = flat.dtype, flat.shape[1:]
    if dtype == np.int32 and tail == ():
        low, high = int(flat.min()), int(flat.max())
        codebook = math.prod(levels) if levels else 2**31
        if low < 0 or high >= codebook:
            raise ValueError(f"codes from {low} to {high} in a codebook of {codebook}")
    elif dtype != np.float32 or len(tail) != 1 or levels:
        raise ValueError(f"codes are {dtype} [n{''.join(f', {n}' for n in tail)}]")
    elif not np.isfinite(flat).all():
        raise ValueError("codes have values that are not finite")


def etok_checksum(arrays: Mapping[str, np.ndarray], text: Mapping[str, str]) -> str:
    """Returns 8 hex digits over names, types, shapes and values."""
    crc = 0
    for name in sorted(text):
        crc = zlib.crc32(f"{name}={text[name]};".encode(), crc)
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        shape = ",".join(map(str, array.shape))
        crc = zlib.crc32(f"{name} {array.dtype.name} {shape};".encode(), crc)
        crc = zlib.crc32(array.reshape(-1).view(np.uint8).data, crc)
    return f"{crc:08x}"


def _smallest(numbers: np.ndarray) -> np.ndarray:
    return numbers.astype(np.min_scalar_type(int(numbers.max())))


def _require_size(path: str | Path) -> None:
    """Rejects a file by its size and that of its header before anything is parsed."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        header = int.from_bytes(file.read(8), "little")
    if size > MAX_FILE_BYTES:
        raise ValueError(f"{size} bytes, more than the limit of {MAX_FILE_BYTES}")
    if not 0 < header <= min(MAX_HEADER_BYTES, size - 8):
        raise ValueError(f"{size} bytes, with a header of {header}")


def _read_text(text: dict[str, str]) -> dict[str, str]:
    found = text.get("format")
    if found != FORMAT:
        raise UsageError(
            f"format {str(found)[:40]!r}, not {FORMAT!r}: encode it again with this version"
        )
    expected = {*_TEXT, "format", "coding", "crc32", "fingerprint"}
    if set(text) != expected:
        raise ValueError(f"its metadata has keys {sorted(text)}, not {sorted(expected)}")
    if text["coding"] not in CODINGS:
        raise ValueError(f"coding {text['coding'][:40]!r}")
    return text


def _read_arrays(file, *, coding: str) -> dict[str, np.ndarray]:
    """Reads the arrays after checking their names, types and shapes.

    safetensors has already checked that they fill the file exactly.
    """
    payload = "words" if coding == "entropy" else "codes"
    names = [payload, "lengths", "met", "mse"]
    if sorted(file.keys()) != sorted(names):
        raise ValueError(f"its arrays are {sorted(file.keys())[:8]}, not {sorted(names)}")
    slices = {name: file.get_slice(name) for name in names}
    shapes = {name: tuple(slices[name].get_shape()) for name in names}
    types = {name: slices[name].get_dtype() for name in names}
    (blocks,) = shapes["lengths"]
    if not shapes["mse"] == shapes["met"] == (blocks,) or not 0 < blocks <= MAX_TOKENS:
        raise ValueError(f"lengths, mse and met have shapes {[shapes[n] for n in names[1:]]}")
    if types["lengths"] not in _UNSIGNED or (types["mse"], types["met"]) != ("F32", "BOOL"):
        raise ValueError(f"lengths, mse and met have types {[types[n] for n in names[1:]]}")
    sound = {1: ("U32",) if coding == "entropy" else _UNSIGNED, 2: ("F32",)}
    dims = len(shapes[payload])
    if types[payload] not in sound.get(dims, ()) or (coding == "entropy" and dims != 1):
        raise ValueError(f"{payload} are {types[payload]} {shapes[payload]}")
    return {name: file.get_tensor(name) for name in names}


def _with_blocks(clip: dict[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Combines the fields in `clip` with those of the arrays, checked for consistency."""
    lengths, mse, met = arrays["lengths"].astype(np.int64), arrays["mse"], arrays["met"]
    _check_blocks(mse, met, lengths=lengths)
    if "words" in arrays:
        flat = entropy.entropy_decode(arrays["words"], lengths=lengths, levels=clip["levels"])
    else:
        flat = arrays["codes"]
        if lengths.sum() != len(flat):
            raise ValueError(f"{len(flat)} codes for lengths that add up to {lengths.sum()}")
        if flat.dtype == np.uint32 and int(flat.max()) >= 2**31:
            raise ValueError(f"a code is {flat.max()}")
        flat = flat if flat.dtype == np.float32 else flat.astype(np.int32)
    codes = BlockCodes(flat, lengths)
    fields = clip | {"codes": codes, "mse": mse, "met": met}
    _check_fields(fields)
    return fields


def _check_clip(fields: Mapping[str, Any]) -> None:
    """Checks the fields that describe the clip and the model."""
    sizes = {name: fields[name] for name in ("frames", "height", "width")}
    window = fields["window_blocks"]
    if any(type(size) is not int or size < 1 for size in (*sizes.values(), window)):
        raise ValueError(f"the clip has sizes {sizes} and a window of {window} blocks")
    if window > MAX_TOKENS:
        raise ValueError(f"a window of {window} blocks exceeds {MAX_TOKENS}")
    if math.prod(sizes.values()) > MAX_PIXELS:
        raise ValueError(f"a clip of {sizes} has more than {MAX_PIXELS} pixels")
    if sizes["height"] * sizes["width"] > MAX_FRAME_PIXELS:
        raise ValueError(f"a frame of {sizes} has more than {MAX_FRAME_PIXELS} pixels")
    for name in ("fps", "bits_per_token"):
        value = fields[name]
        if type(value) not in (int, float) or not 0 <= value < 2**31:  # false for NaN
            raise ValueError(f"{name} is {value}")
    levels, fingerprint = fields["levels"], fields["fingerprint"]
    small = any(type(level) is not int or level < 2 for level in levels)
    if small or math.prod(levels) > 2**31:
        raise ValueError(f"levels are {levels}")
    if not (isinstance(fingerprint, str) and fingerprint.isalnum() and len(fingerprint) <= 64):
        raise ValueError(f"the model's fingerprint is {fingerprint!r}")


def _check_blocks(mse: np.ndarray, met: np.ndarray, *, lengths: np.ndarray) -> None:
    if not len(mse) == len(met) == len(lengths):
        raise ValueError(f"{len(lengths)} blocks, {len(mse)} values of mse, {len(met)} of met")
    if mse.dtype != np.float32 or mse.ndim != 1 or met.dtype != np.bool_ or met.ndim != 1:
        raise ValueError(f"mse and met are {mse.dtype} {mse.shape} and {met.dtype} {met.shape}")
    if met.view(np.uint8).max() > 1:
        raise ValueError("met has values other than true and false")
    if not (np.isfinite(mse).all() and mse.min() >= 0):
        raise ValueError("mse has values that are negative or not finite")
    if lengths.min() < 1 or lengths.sum() > MAX_TOKENS:
        raise ValueError(
            f"blocks of {lengths.min()} to {lengths.max()} tokens, {lengths.sum()} in all; "
            f"each needs at least 1, and all together may have at most {MAX_TOKENS}"
        )
