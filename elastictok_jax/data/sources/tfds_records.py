"""Writes and reads record data sets: those of `elastictok prepare`, and any TFDS data set on disk.

A prepared data set is a plain TFDS data set in array_record files. Each record is an image (JPEG or
PNG) or up to PART_FRAMES frames of video (MP4); an item is an image, or the consecutive records of
a stretch of video. `index.safetensors` beside it holds the columns that planning needs.
TensorFlow is not needed for any of it.
"""

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from tensorflow_datasets.proto import tf_example_pb2

from elastictok_jax.data.media import (
    MediaError,
    StoredVideo,
    crop_long_strip,
    decode_image,
    resize_shortest,
)
from elastictok_jax.data.media.open_videos import OpenVideos
from elastictok_jax.errors import UsageError, first_line

PART_FRAMES = 512  # bounds what one random read has to load
DATASET, SPLIT = "media", "train"
INDEX = "index.safetensors"
WORK = ".prepare"  # in the folder of a prepared data set, until it is complete
INDEX_VERSION = 1
INDEX_COLUMNS = {
    "is_video": np.uint8,
    "frames": np.uint32,  # in the record
    "part": np.uint32,  # the record's index within its item
    "fps": np.float64,
    "height": np.uint32,
    "width": np.uint32,
    "place": np.uint64,  # hash of the original's name
}
FRAME_RATE = 24.0  # assumed for videos that state none


def _tfds_features() -> tfds.features.FeaturesDict:
    """Returns the features of a prepared data set."""
    return tfds.features.FeaturesDict(
        {
            "kind": tfds.features.Text(doc="image or video"),
            "data": tfds.features.Scalar(np.bytes_, doc="a JPEG, PNG or MP4 file"),
            "source": tfds.features.Text(doc="file it was made from, relative to its folder"),
            "content_hash": tfds.features.Text(doc="SHA-256 of that file"),
            "start": tfds.features.Scalar(np.int64, doc="first frame, in that file"),
            "part": tfds.features.Scalar(np.int64, doc="place among the records of its item"),
            "frames": tfds.features.Scalar(np.int64),
            "fps": tfds.features.Scalar(np.float64, doc="frames a second, 0 for an image"),
            "height": tfds.features.Scalar(np.int64, doc="pixels; padding beyond it is cut off"),
            "width": tfds.features.Scalar(np.int64),
            "duration": tfds.features.Scalar(np.float64, doc="seconds"),
        }
    )


def tfds_shard_name(shard: int, shards: int) -> str:
    """Returns the TFDS file name of a shard."""
    return f"{DATASET}-{SPLIT}.array_record-{shard:05}-of-{shards:05}"


class RecordWriter:
    """Writes records to one array_record file, and collects their index columns.

    Raises:
      OSError: from any method, if the file cannot be written.
    """

    def __init__(self, path: Path):
        self._features = _tfds_features()
        self._serializer = tfds.core.example_serializer.ExampleSerializer(
            self._features.get_serialized_info()
        )
        with _write_errors():
            self._writer = ArrayRecordWriter(str(path), "group_size:1")  # one record, one read
        self.columns: dict[str, list] = {name: [] for name in INDEX_COLUMNS}
        self.bytes = 0

    def write(self, record: dict[str, Any], *, place: int) -> None:
        """Writes one record with the fields of `_tfds_features`; `place` is its original's."""
        example = self._serializer.get_tf_example(self._features.encode_example(record))
        encoded = example.SerializeToString(deterministic=True)  # a map's order is arbitrary
        with _write_errors():
            self._writer.write(encoded)
        self.bytes += len(encoded)
        row = {name: record[name] for name in self.columns if name in record}
        row |= {"is_video": record["kind"] == "video", "place": place}
        for name, value in row.items():
            self.columns[name].append(value)

    def close(self) -> None:
        """Flushes and closes the file."""
        with _write_errors():
            self._writer.close()


@contextlib.contextmanager
def _write_errors() -> Iterator[None]:
    """Raises array_record's write errors as OSError."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(str(error).partition(";")[0]) from error


def write_tfds_metadata(
    directory: Path, *, shard_lengths: list[int], num_bytes: int, columns: dict[str, list]
) -> None:
    """Writes dataset_info.json, features.json and the index of all records in shard order.

    Raises:
      OSError: if they cannot be written.
    """
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=DATASET,
        version=tfds.core.Version("1.0.0"),
        data_dir=os.fspath(directory),
        module_name="",
    )
    info = tfds.core.DatasetInfo(builder=identity, features=_tfds_features())
    info.set_file_format(tfds.core.FileFormat.ARRAY_RECORD)
    template = tfds.core.ShardedFileTemplate(
        dataset_name=DATASET,
        data_dir=os.fspath(directory),
        split=SPLIT,
        filetype_suffix="array_record",
    )
    split = tfds.core.SplitInfo(
        name=SPLIT, shard_lengths=shard_lengths, num_bytes=num_bytes, filename_template=template
    )
    info.set_splits(tfds.core.splits.SplitDict([split]))
    arrays = {name: np.array(columns[name], kind) for name, kind in INDEX_COLUMNS.items()}
    # One entry, as safetensors writes several in arbitrary order.
    metadata = {"layout": json.dumps({"version": INDEX_VERSION, "part_frames": PART_FRAMES})}
    (directory / INDEX).write_bytes(save(arrays, metadata))
    info.write_to_directory(directory)


def is_record_dataset(directory: str | Path) -> bool:
    """Returns whether `directory` holds a TFDS data set.

    Raises:
      UsageError: if the data set is still being prepared.
    """
    if (Path(directory) / WORK).is_dir():
        raise UsageError(
            f"data set {directory} is not complete: run the same `elastictok prepare` again"
        )
    return (Path(directory) / "dataset_info.json").is_file()


class RecordSource:
    """Reads the items of a split of a TFDS data set on disk; see `base.Source`.

    A prepared data set is planned from its index. In any other, the first image feature gives
    images, or the first sequence of images gives videos, whose lengths are read from all records.

    Raises:
      UsageError: if the data set, its index or its split cannot be read, or holds neither.
    """

    def __init__(self, directory: str | Path, *, split: str):
        self._directory, self._split = str(directory), split
        self._videos = OpenVideos()
        self._local = threading.local()
        try:
            builder = tfds.builder_from_directory(self._directory)
            count = builder.info.splits[split].num_examples
        except Exception as error:  # tfds raises many types
            known = _split_names(self._directory)
            raise UsageError(
                f"data set {directory}: split {split} cannot be read ({first_line(error)}); "
                f"its splits are {known}"
            ) from error
        self._feature, self._is_sequence = "", False
        if (Path(directory) / INDEX).is_file():
            self._read_index(builder.info.splits, count)
        else:
            self._look_through(builder.info.features, count)
        digest = hashlib.sha256(split.encode())
        for column in (self.frames, self.place):
            digest.update(np.ascontiguousarray(column).data)
        self.fingerprint = digest.hexdigest()[:16]

    def _read_index(self, splits, count: int) -> None:
        path = Path(self._directory) / INDEX
        try:
            with safe_open(path, framework="numpy") as file:
                layout = json.loads((file.metadata() or {}).get("layout", "{}"))
                columns = {name: file.get_tensor(name) for name in INDEX_COLUMNS}
        except (OSError, ValueError, SafetensorError) as error:
            raise UsageError(
                f"{path} is damaged ({first_line(error)}): prepare the data set again"
            ) from error
        if layout.get("version") != INDEX_VERSION:
            raise UsageError(
                f"{path} has version {layout.get('version')}, this program reads version "
                f"{INDEX_VERSION}: prepare the data set again"
            )
        self._part_frames = int(layout["part_frames"])
        chosen = _records_of(splits[self._split], shard_lengths=splits[SPLIT].shard_lengths)
        columns = {name: column[chosen] for name, column in columns.items()}
        if len(columns["part"]) != count:
            raise UsageError(f"{path} does not fit its data set: prepare the data set again")
        self._first = np.flatnonzero(columns["part"] == 0)
        starts = self._first
        self.is_video = columns["is_video"][starts].astype(bool)
        # A slice of the split may begin or end within an item: such items are dropped or cut.
        inside = slice(int(starts[0]), None) if len(starts) else slice(0, 0)
        counts = columns["frames"][inside].astype(np.int64)
        self.frames = np.add.reduceat(counts, starts - starts[:1]) if len(starts) else counts
        self.fps = columns["fps"][starts]
        self.place = columns["place"][starts]
        self._sizes = np.stack([columns["height"], columns["width"]], axis=1)[starts]

    def _look_through(self, feature_dict, count: int) -> None:
        """Finds the first image or image sequence feature of a data set without an index."""
        self._part_frames = 0
        image_kind, sequence_kinds = tfds.features.Image, (tfds.features.Sequence,)
        for name, feature in feature_dict.items():
            if isinstance(feature, image_kind):
                self._feature = name
                break
            inner = getattr(feature, "feature", None)
            if isinstance(feature, sequence_kinds) and isinstance(inner, image_kind):
                self._feature, self._is_sequence = name, True
                break
        if not self._feature:
            raise UsageError(
                f"data set {self._directory} has no feature of images or of sequences of images "
                f"(it has {', '.join(feature_dict)}): prepare it from its files"
            )
        self._first = np.arange(count)
        self.is_video = np.full(count, self._is_sequence)
        numbers = np.arange(count, dtype=np.uint64)
        self.place = _spread(numbers)
        if self._is_sequence:
            records = [self._record(index) for index in range(count)]
            self.frames = np.array([len(r[self._feature]) for r in records], np.int64)
            self.fps = np.array([float(r.get("fps", FRAME_RATE)) for r in records])
        else:
            self.frames, self.fps = np.ones(count, np.int64), np.zeros(count)

    def name(self, item: int) -> str:
        record = self._record(int(self._first[item]))
        if not self._feature:
            start = int(record["start"])
            return _text(record["source"]) + (f"@{start}" if start else "")
        return f"{self._feature}/{item}"

    def encoded_image(self, item: int) -> bytes:
        """Returns the encoded file of an image item."""
        return self._stored_file(int(self._first[item]))

    def read(self, item: int, indices: np.ndarray, *, side: int) -> np.ndarray:
        frames = crop_long_strip(self._read_stored(item, indices))
        return resize_shortest(frames, side=side, name=self._where(int(self._first[item])))

    def read_at_most(self, item: int, indices: np.ndarray, *, side: int) -> np.ndarray:
        """Reads like `read`, but never enlarges; side 0 keeps the stored size."""
        frames = self._read_stored(item, indices)
        stored = min(frames.shape[1:3])
        return resize_shortest(frames, side=min(side or stored, stored))

    def _read_stored(self, item: int, indices: np.ndarray) -> np.ndarray:
        first = int(self._first[item])
        if not 0 <= indices[0] <= indices[-1] < self.frames[item]:
            raise MediaError(
                f"{self._where(first)}: frames {indices[0]} to {indices[-1]} requested, of "
                f"{self.frames[item]}"
            )
        if self._feature:
            return self._read_pictures(first, indices)
        height, width = (int(edge) for edge in self._sizes[item])
        if not self.is_video[item]:
            frames = decode_image(self._stored_file(first), name=self._where(first))[None]
        else:
            parts = indices // self._part_frames
            pieces = [
                self._video(first + int(part)).read_at(
                    indices[parts == part] - int(part) * self._part_frames
                )
                for part in np.unique(parts)
            ]
            frames = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        if frames.shape[1] < height or frames.shape[2] < width:
            raise MediaError(
                f"{self._where(first)}: its size differs from the index; prepare it again"
            )
        return frames[:, :height, :width]

    def _video(self, number: int) -> StoredVideo:
        def load() -> StoredVideo:
            return StoredVideo(self._stored_file(number), name=self._where(number))

        return self._videos.open(number, load)

    def _read_pictures(self, first: int, indices: np.ndarray) -> np.ndarray:
        value = self._record(first)[self._feature]
        pictures = [value[int(index)] for index in indices] if self._is_sequence else [value]
        frames = [decode_image(data, name=self._where(first)) for data in pictures]
        if len({frame.shape for frame in frames}) > 1:
            raise MediaError(f"{self._where(first)}: the frame size changes")
        return np.stack(frames)

    def _where(self, number: int) -> str:
        return f"{self._directory} {self._split} record {number}"

    def _record(self, number: int) -> dict[str, Any]:
        """Reads a record with its images still encoded.

        Raises:
          MediaError: if it cannot be read or parsed.
        """
        try:
            if not hasattr(self._local, "records"):
                self._local.records = self._open()
            return self._local.records[number]
        except Exception as error:  # array_record and protobuf raise many types
            raise self._damaged(number, error) from error

    def _stored_file(self, number: int) -> bytes:
        """Reads the file in a record, in half the time that parsing the full record takes."""
        if self._feature:
            return self._record(number)[self._feature]
        try:
            if not hasattr(self._local, "raw"):
                raw = tfds.decode.DeserializeMethod.RAW_BYTES
                builder = tfds.builder_from_directory(self._directory)
                self._local.raw = builder.as_data_source(self._split, deserialize_method=raw)
            example = tf_example_pb2.Example.FromString(self._local.raw[number])
            return example.features.feature["data"].bytes_list.value[0]
        except Exception as error:  # as above
            raise self._damaged(number, error) from error

    def _damaged(self, number: int, error: Exception) -> MediaError:
        return MediaError(f"{self._where(number)}: damaged ({first_line(error)}); prepare it again")

    def _open(self):
        builder = tfds.builder_from_directory(self._directory)
        decoders = {self._feature: _Encoded()} if self._feature else None
        return builder.as_data_source(self._split, decoders=decoders)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["_local"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._local = threading.local()


class _Encoded(tfds.decode.SkipDecoding):
    """Leaves images encoded, also in sequences, which tfds' own class does not."""

    def decode_batch_example_np(self, serialized_example):
        return serialized_example


def _records_of(split_info, *, shard_lengths: list[int]) -> np.ndarray:
    """Returns the indices, among all records of SPLIT, of a split or slice of it: int64."""
    base = np.cumsum([0, *shard_lengths])
    pieces = [np.arange(0)]
    for instruction in split_info.file_instructions:
        shard = int(str(instruction.filename).rsplit("-of-", 1)[0].rsplit("-", 1)[1])
        start = int(base[shard]) + instruction.skip
        pieces.append(np.arange(start, start + instruction.take))
    return np.concatenate(pieces)


def _split_names(directory: str) -> str:
    try:
        return ", ".join(tfds.builder_from_directory(directory).info.splits)
    except Exception:  # may be what failed before
        return "unknown"


def _spread(numbers: np.ndarray) -> np.ndarray:
    """Hashes uint64 numbers to uint64 (SplitMix64)."""
    with np.errstate(over="ignore"):
        x = numbers + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def _text(value) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
