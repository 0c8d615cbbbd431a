"""Reads the stream of arrays in a published ElasticTok checkpoint.

The file is a stream of msgpack pairs [key path, bytes], where the bytes are one flax-serialised
array (msgpack extension 1 holding (shape, dtype name, row-major data), or flax's dict of chunks if
the array exceeds 2^30 bytes). A train state holds its weights under the prefix ('params',
'params'); its optimizer state is skipped without being read.

Sizes claimed by the file are checked against the file before anything is allocated.
"""

import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import ml_dtypes
import msgpack
import numpy as np

from elastictok_jax.errors import UsageError

Key = tuple[str, ...]

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
_MAX_CHUNKS = 64  # a value holds < 2^32 bytes, a chunk 2^30
_NOT_WEIGHTS = ("opt_state", "step")  # the rest of a flax TrainState
_MSGPACK_ERRORS = (ValueError, TypeError, msgpack.UnpackException)


class _Entry(NamedTuple):
    """The location of a weight: its key without 'params' prefixes, and its bytes."""

    key: Key
    offset: int
    length: int


def read_published_stream(path: str | os.PathLike) -> Iterator[tuple[Key, np.ndarray]]:
    """Streams the weights of a published file, holding one array in memory at a time.

    Args:
      path: a `streaming_params` or `streaming_train_state` file.

    Yields:
      (key path without the 'params' prefix, read-only array in the stored dtype).

    Raises:
      UsageError: naming file and key, if the file is missing, cut short or not such a stream, or
        an array is not float32, float16 or bfloat16 or does not have the size of its shape.
    """
    path = Path(path)
    with _open(path) as file:
        for entry in _entries(file, path=path):
            file.seek(entry.offset)
            yield entry.key, _decode_array(file.read(entry.length), key=entry.key, path=path)


def _open(path: Path) -> BinaryIO:
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    try:
        return path.open("rb")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error}") from error


def published_stream_keys(path: Path) -> set[Key]:
    """Returns the keys of the weights in the file without reading the weights."""
    with _open(path) as file:
        return {entry.key for entry in _entries(file, path=path)}


def _entries(file: BinaryIO, *, path: Path) -> Iterator[_Entry]:
    """Yields each weight in the stream; leaves `file` at an arbitrary position."""
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
    """Reads one pair up to its value; returns (key, offset and number of the value's bytes)."""
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
    """Decodes one flax-serialised array, chunked or not."""
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
    """Decodes (shape, dtype, data).

    Raises ValueError unless the dtype is supported and the number of bytes matches.
    """
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
        raise ValueError("it has no chunks, or chunks of several dtypes")
    if any(array.ndim != 1 for array in arrays):
        raise ValueError("a chunk is not flat")
    if sum(array.size for array in arrays) != math.prod(shape):
        raise ValueError(f"shape {tuple(shape)} does not match the size of its chunks")
    return np.concatenate(arrays).reshape(shape)


def _numbered(items: object) -> list:
    """Converts {'0': a, '1': b} to [a, b]."""
    if not isinstance(items, dict) or set(items) != {str(i) for i in range(len(items))}:
        raise ValueError("its chunks or shape are not numbered from 0")
    return [items[str(i)] for i in range(len(items))]


def _check_shape(shape: object) -> None:
    if not isinstance(shape, list) or len(shape) > _MAX_RANK:
        raise ValueError(f"shape {shape!r:.80} is not a short list")
    if not all(type(size) is int and size > 0 for size in shape):
        raise ValueError(f"shape {shape!r:.80} holds something other than sizes")
