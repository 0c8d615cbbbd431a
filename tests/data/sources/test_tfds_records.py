"""Record data sets: plain TFDS reads them without TensorFlow, and frames are exact in any order."""

import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elastictok_jax.config import apply_overrides, resolve_config
from elastictok_jax.data import media
from elastictok_jax.data.media import MediaError, color
from elastictok_jax.data.prepare.supervisor import prepare_data_set
from elastictok_jax.data.prepare.transcode import TranscodeSettings
from elastictok_jax.data.sources import tfds_records
from elastictok_jax.data.sources.file_source import EMBEDDED
from elastictok_jax.data.sources.splits import open_splits
from elastictok_jax.data.sources.tfds_records import RecordSource
from elastictok_jax.errors import UsageError
from elastictok_jax.experiment_registry import get_experiment
from tests.tiny import reader_of

SETTINGS = TranscodeSettings(resolution=64, crf=20, scene_cuts=False, limits=media.LIMITS)
REAL = os.environ.get("ELASTICTOK_MEDIA")  # a folder with further real clips


def decode_in_order(data: bytes) -> np.ndarray:
    """Decodes every frame sequentially, independently of the code under test."""
    with av.open(io.BytesIO(data)) as container:
        return np.stack(
            [
                frame.to_ndarray(format="rgb24", interpolation=color.EXACT_COLORS)
                for frame in container.decode(video=0)
            ]
        )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Prepares the embedded footage as a data set of several shards."""
    folder = tmp_path_factory.mktemp("prepared") / "set"
    prepare_data_set([str(EMBEDDED)], output=folder, settings=SETTINGS, jobs=2, shard_mib=1)
    return folder


def stored(folder) -> dict[str, list[dict]]:
    """Returns records by their source, as plain TFDS reads them."""
    found: dict[str, list[dict]] = {}
    for record in tfds.builder_from_directory(folder).as_data_source("train"):
        found.setdefault(record["source"].decode(), []).append(record)
    return found


def test_plain_tfds_reads_it_without_tensorflow(prepared):
    code = (
        "import sys, tensorflow_datasets as tfds\n"
        f"source = tfds.builder_from_directory({str(prepared)!r}).as_data_source('train')\n"
        "kinds = [source[i]['kind'] for i in range(len(source))]\n"
        "print(kinds.count(b'image'), kinds.count(b'video'), 'tensorflow' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    images = len(list(EMBEDDED.glob("*/*.jpg")))
    videos = len(list(EMBEDDED.glob("*/*.mp4")))
    assert done.stdout.split() == [str(images), str(videos), "False"]


def test_fields_say_what_the_original_was(prepared):
    for source, (record,) in stored(prepared).items():
        info = media.probe(EMBEDDED / source)
        assert record["kind"].decode() == info.kind
        assert record["frames"] == info.frames
        assert min(record["height"], record["width"]) == min(64, info.height, info.width)
        if info.kind == "video":
            assert record["fps"] == pytest.approx(info.fps)
            assert record["duration"] == pytest.approx(info.frames / info.fps)
        assert len(record["content_hash"]) == 64
        assert (record["start"], record["part"]) == (0, 0)


def check_random_order(source, item, expected, *, seed, side):
    rng = np.random.default_rng(seed)
    total = len(expected)
    for _ in range(12):
        count = int(rng.integers(1, min(24, total) + 1))
        if rng.random() < 0.7:
            start = int(rng.integers(0, total - count + 1))
            indices = np.arange(start, start + count)
        else:
            indices = np.sort(rng.choice(total, count, replace=False))
        np.testing.assert_array_equal(source.read(item, indices, side=side), expected[indices])


def check_frames_are_exact(folder):
    source = RecordSource(folder, split="train")
    by_source = stored(folder)
    checked = 0
    for item in np.flatnonzero(source.is_video):
        name, _, start = source.name(int(item)).partition("@")
        parts, first = [], int(start or 0)
        for record in by_source[name]:  # in order; an item ends where the next part 0 begins
            if record["start"] < first:
                continue
            if parts and record["part"] == 0:
                break
            height, width = int(record["height"]), int(record["width"])
            parts.append(decode_in_order(record["data"])[:, :height, :width])
        expected = np.concatenate(parts)
        assert len(expected) == source.frames[item]
        side = min(expected.shape[1:3])
        check_random_order(source, int(item), expected, seed=int(item), side=side)
        checked += 1
    return checked


def test_frames_in_random_order_equal_sequential_decoding(prepared):
    assert check_frames_are_exact(prepared) == len(list(EMBEDDED.glob("*/*.mp4")))


def test_frames_are_exact_across_parts(tmp_path, monkeypatch):
    """A long video is split over several records; here every 20 frames."""
    monkeypatch.setattr("elastictok_jax.data.prepare.transcode.PART_FRAMES", 20)
    monkeypatch.setattr("elastictok_jax.data.sources.tfds_records.PART_FRAMES", 20)
    writer = tfds_records.RecordWriter(tmp_path / tfds_records.tfds_shard_name(0, 1))
    from elastictok_jax.data.prepare.transcode import transcode_file

    names = ["bbb_kite.mp4", "bbb_stream.mp4"]
    for name in names:
        path = EMBEDDED / "heldout" / name
        for record in transcode_file(path, name=name, settings=SETTINGS)[0]:
            writer.write(record, place=1)
    writer.close()
    lengths = [len(writer.columns["part"])]
    tfds_records.write_tfds_metadata(
        tmp_path, shard_lengths=lengths, num_bytes=writer.bytes, columns=writer.columns
    )
    assert lengths[0] > 4
    assert check_frames_are_exact(tmp_path) == 2
    # A slice of the split that begins within an item leaves the rest of that item out.
    part = RecordSource(tmp_path, split="train[1:]")
    assert part.name(0) == names[1]
    assert (
        part.read(0, np.arange(15, 30), side=64)
        == RecordSource(tmp_path, split="train").read(1, np.arange(15, 30), side=64)
    ).all()


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="ELASTICTOK_MEDIA names no folder of clips")
def test_frames_of_further_real_clips_are_exact(tmp_path):
    folder = tmp_path / "set"
    options = TranscodeSettings(resolution=128, crf=20, scene_cuts=False, limits=media.LIMITS)
    prepare_data_set([REAL], output=folder, settings=options, jobs=2)
    assert check_frames_are_exact(folder) > 3


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(indices=st.sets(st.integers(0, 47), min_size=1))
def test_any_ascending_frames_of_a_stored_video(indices):
    data = stored_clip()
    wanted = sorted(indices)
    video = media.StoredVideo(data, name="clip")
    np.testing.assert_array_equal(video.read_at(wanted), decode_in_order(data)[wanted])
    np.testing.assert_array_equal(video.read_at([wanted[0]])[0], decode_in_order(data)[wanted[0]])


_CLIP = []


def stored_clip() -> bytes:
    if not _CLIP:
        frames = media.read_frames(EMBEDDED / "heldout" / "bbb_kite.mp4", count=48, side=32)
        _CLIP.append(media.encode_video_bytes(frames, fps=24, crf=20))
    return _CLIP[0]


def test_damaged_records_are_said(prepared):
    source = RecordSource(prepared, split="train")
    item = int(np.flatnonzero(source.is_video)[0])
    with pytest.raises(MediaError, match=r"record \d+: frames 5 to 9999 requested, of \d+"):
        source.read(item, np.array([5, 9999]), side=64)
    for cut in (0, 10, 2000):
        with pytest.raises(MediaError, match="clip: damaged"):
            media.StoredVideo(stored_clip()[:cut], name="clip").read_at(range(48))


def test_a_truncated_shard_gives_an_error_and_no_wrong_frames(prepared, tmp_path):
    import shutil

    shutil.copytree(prepared, tmp_path / "set")
    shard = sorted((tmp_path / "set").glob("*.array_record*"))[0]
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 3])
    sound, cut = (RecordSource(f, split="train") for f in (prepared, tmp_path / "set"))
    failed = 0
    for item in range(len(sound.frames)):
        expected = sound.read(item, np.zeros(1, int), side=64)
        try:
            np.testing.assert_array_equal(cut.read(item, np.zeros(1, int), side=64), expected)
        except MediaError as error:
            failed += 1
            assert "prepare it again" in str(error)
    assert 0 < failed < len(sound.frames)


def test_bad_data_sets_are_said(prepared, tmp_path):
    import shutil

    with pytest.raises(UsageError, match=r"split test cannot be read .*its splits are train"):
        RecordSource(prepared, split="test")
    shutil.copytree(prepared, tmp_path / "set")
    (tmp_path / "set" / tfds_records.INDEX).write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00garbage!")
    with pytest.raises(UsageError, match=r"index\.safetensors is damaged .*prepare the data set"):
        RecordSource(tmp_path / "set", split="train")


def test_sources_pickle_and_train_like_before(prepared):
    config = get_experiment("quickstart")
    values = {"data.sources.main.path": str(prepared), "video.resolution": 32}
    apply_overrides(config, values | {"data.batch_size": 2, "masking.min_tokens": 1})
    config = resolve_config(config)
    reader = reader_of(config, open_splits(config), split="train")
    first = [reader(k) for k in (0, 3)]
    again = pickle.loads(pickle.dumps(reader))
    for k, batch in zip((0, 3), first, strict=True):
        np.testing.assert_array_equal(again(k)["patches"], batch["patches"])
        assert not batch["faults"]


class Pictures(tfds.core.GeneratorBasedBuilder):
    """A foreign TFDS data set: PNG images, and short sequences of them."""

    VERSION = tfds.core.Version("1.0.0")
    sequences = False

    def _info(self):
        image = tfds.features.Image(shape=(None, None, 3), encoding_format="png")
        feature = tfds.features.Sequence(image) if self.sequences else image
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {"label": tfds.features.Scalar(np.int64), "x": feature}
            ),
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(8), "test": self._generate_examples(3)}

    def _generate_examples(self, count):
        import io

        from PIL import Image

        for number in range(count):
            files = []
            for frame in range(number + 1 if self.sequences else 1):
                file = io.BytesIO()
                pixels = np.full((20, 30, 3), 10 * number + frame, np.uint8)
                Image.fromarray(pixels).save(file, "PNG")
                file.seek(0)
                files.append(file)
            yield number, {"label": number, "x": files if self.sequences else files[0]}


class Sequences(Pictures):
    sequences = True


@pytest.mark.parametrize("builder", [Pictures, Sequences])
def test_any_tfds_data_set_of_pictures(tmp_path, builder):
    made = builder(data_dir=str(tmp_path), file_format="array_record")
    made.download_and_prepare()
    folder = Path(made.data_dir)
    source = RecordSource(folder, split="train")
    assert len(source.frames) == 8
    assert source.is_video.tolist() == [builder.sequences] * 8
    for item in range(8):
        value = int(source.read(item, np.zeros(1, int), side=20)[0, 0, 0, 0])
        assert value % 10 == 0
        if builder.sequences:
            assert source.frames[item] == value // 10 + 1
            last = source.read(item, np.array([source.frames[item] - 1]), side=10)
            assert last.shape == (1, 10, 15, 3) and last[0, 0, 0, 0] == value + value // 10
    assert len(set(source.place.tolist())) == 8
    config = get_experiment("quickstart")
    values = {"data.sources.main.path": str(folder), "data.sources.main.heldout_split": "test"}
    apply_overrides(config, values)
    feeds = open_splits(resolve_config(config))
    assert [len(feed.items) for feed in (*feeds.train, *feeds.heldout)] == [8, 3]
    # And it can be prepared.
    report = prepare_data_set([str(folder)], output=tmp_path / "set", settings=SETTINGS, jobs=1)
    assert report["video_clips" if builder.sequences else "images"] == 8


def test_a_data_set_without_pictures_is_refused(tmp_path):
    class Numbers(Pictures):
        def _info(self):
            features = tfds.features.FeaturesDict({"label": tfds.features.Scalar(np.int64)})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _generate_examples(self, count):
            yield 0, {"label": 0}

    made = Numbers(data_dir=str(tmp_path), file_format="array_record")
    made.download_and_prepare()
    with pytest.raises(UsageError, match=r"no feature of images .*\(it has label\)"):
        RecordSource(made.data_dir, split="train")
