"""The sources of a config, opened and split."""

import hashlib

import numpy as np
import pytest
from PIL import Image

from elastictok_jax.config import apply_overrides, resolve_config
from elastictok_jax.data import media
from elastictok_jax.data.sources.file_source import EMBEDDED, FileSource
from elastictok_jax.data.sources.listing import list_media
from elastictok_jax.data.sources.splits import open_splits
from elastictok_jax.data.sources.synthetic import SyntheticSource
from elastictok_jax.errors import UsageError
from elastictok_jax.experiment_registry import get_experiment

KIND = "data.sources.main.kind"


def config_for(source, **overrides):
    config = get_experiment("quickstart")
    apply_overrides(config, {"data.sources.main.path": str(source)} | overrides)
    return resolve_config(config)


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (16, 24, 3), dtype=np.uint8)


def names_of(feeds) -> list[str]:
    return [feed.source.name(item) for feed in feeds for item in feed.items]


def test_folder_is_split_and_stays_split(tmp_path):
    (tmp_path / "deep" / "down").mkdir(parents=True)
    for number in range(12):
        media.write_image(tmp_path / "deep" / "down" / f"{number}.png", picture(number))
    (tmp_path / "notes.txt").write_text("no media")
    (tmp_path / ".hidden.png").write_bytes(b"not looked at")
    config = config_for(tmp_path, **{"data.eval_fraction": 0.3})
    feeds = open_splits(config)
    train, heldout = names_of(feeds.train), names_of(feeds.heldout)
    assert train and heldout and not set(train) & set(heldout)
    assert sorted(train + heldout) == sorted(f"deep/down/{number}.png" for number in range(12))
    again = open_splits(config)
    assert names_of(again.heldout) == heldout and again.fingerprint() == feeds.fingerprint()
    media.write_image(tmp_path / "another.png", picture(99))
    more = open_splits(config)
    assert set(heldout) <= set(names_of(more.heldout))
    assert more.fingerprint() != feeds.fingerprint()


def test_the_same_files_elsewhere_are_split_alike(tmp_path):
    splits = []
    for folder in (tmp_path / "here", tmp_path / "there"):
        folder.mkdir()
        for number in range(8):
            media.write_image(folder / f"{number}.png", picture(number))
        feeds = open_splits(config_for(folder, **{"data.eval_fraction": 0.4}))
        splits.append((names_of(feeds.heldout), feeds.fingerprint()))
    assert splits[0] == splits[1] and splits[0][0]


def test_glob_and_kind(tmp_path):
    for name in ("a/one.PNG", "a/two.png", "b/three.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        media.write_image(tmp_path / name, picture(1))
    frames = np.stack([picture(n) for n in range(9)])
    media.write_video(tmp_path / "a" / "clip.mp4", frames, fps=10)
    plain = {"data.eval_fraction": 0.0}
    feeds = open_splits(config_for(f"{tmp_path}/*/*.[pP][nN][gG]", **plain))
    assert names_of(feeds.train) == ["a/one.PNG", "a/two.png", "b/three.png"]
    for kind, names in (("video", ["a/clip.mp4"]), ("any", 4), ("image", 3)):
        found = names_of(open_splits(config_for(tmp_path, **plain | {KIND: kind})).train)
        assert found == names or len(found) == names
    with pytest.raises(UsageError, match=r"source main .* has no video: .*main\.weight=0"):
        open_splits(config_for(tmp_path / "b", **plain | {KIND: "video"}))


def test_embedded_splits_share_no_file_and_no_frame():
    contents, frames, names = {}, {}, {}
    for split in ("train", "heldout"):
        paths = list_media(EMBEDDED / split).files
        assert paths
        frames[split] = set()
        for path in paths:
            pixels = media.read_frames(path)
            frames[split] |= {hashlib.sha256(frame.tobytes()).digest() for frame in pixels}
        contents[split] = {hashlib.sha256(path.read_bytes()).digest() for path in paths}
        names[split] = {path.name for path in paths}
        (feed,) = open_splits(config_for("embedded")).split(split)
        assert {feed.source.name(item) for item in feed.items} == {
            f"{split}/{name}" for name in names[split]
        }
        assert {False, True} == set(feed.source.is_video[feed.items])
    for parts in (contents, frames, names):
        assert not parts["train"] & parts["heldout"]


def test_nothing_to_read_is_said(tmp_path):
    with pytest.raises(UsageError, match=r"data folder .*missing does not exist: give a folder"):
        list_media(tmp_path / "missing")
    (tmp_path / "a.txt").write_text("")
    for path in (tmp_path, tmp_path / "*.mp4"):
        with pytest.raises(UsageError, match="holds no image or video"):
            list_media(path)
    with pytest.raises(UsageError, match="heldout_split is for TFDS"):
        open_splits(config_for("synthetic", **{"data.sources.main.heldout_split": "test"}))


def test_damaged_files_are_left_out_up_to_a_share(tmp_path):
    for number in range(9):
        media.write_image(tmp_path / f"{number}.png", picture(number))
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n damaged")
    feeds = open_splits(config_for(tmp_path))
    (message,) = feeds.damaged
    assert "bad.png" in message
    assert len(names_of(feeds.train + feeds.heldout)) == 9
    (tmp_path / "worse.png").write_bytes(b"")
    with pytest.raises(UsageError, match=r"2 of 11 files cannot be used, more than data\.max_bad"):
        open_splits(config_for(tmp_path))
    open_splits(config_for(tmp_path, **{"data.max_bad_fraction": 0.2}))


def test_synthetic_items_are_functions_of_their_number():
    source, again = SyntheticSource(), SyntheticSource()
    assert {False, True} == set(source.is_video)
    assert (source.frames[~source.is_video] == 1).all() and (source.frames >= 1).all()
    item = int(np.flatnonzero(source.frames > 20)[0])
    frames = source.read(item, np.arange(20), side=16)
    assert frames.shape[:2] == (20, 16) and frames.dtype == np.uint8
    assert (frames[[3, 17]] == again.read(item, np.array([3, 17]), side=16)).all()
    assert (frames[0] != frames[-1]).any()
    assert (frames != source.read(item + 1, np.zeros(1, int), side=16)).any()


def test_a_strip_is_read_at_little_cost_and_its_middle_is_what_it_was(tmp_path):
    strip = np.random.default_rng(0).integers(0, 256, (1, 65500, 3), dtype=np.uint8)
    media.write_image(tmp_path / "strip.png", strip)
    media.write_image(tmp_path / "tall.png", strip.transpose(1, 0, 2))
    source = FileSource(tmp_path)
    wide = source.read(0, np.zeros(1, int), side=32)
    assert wide.shape == (1, 32, 16 * 32, 3)
    assert source.read(1, np.zeros(1, int), side=32).shape == (1, 16 * 32, 32, 3)
    full = media.resize_shortest(strip[None, :, 32700:32800], side=32)  # 65500 / 2 is in the middle
    np.testing.assert_array_equal(
        media.center_crop(wide, height=32, width=32), media.center_crop(full, height=32, width=32)
    )
    with pytest.raises(media.MediaError, match=r"strip\.png: 16x1 scaled to 8000 pixels"):
        source.read(0, np.zeros(1, int), side=8000)


@pytest.mark.parametrize("key", ["video.resolution", "data.sources.main.resolution"])
def test_a_resolution_beyond_the_limit_is_refused_before_anything_is_read(key):
    config = config_for("embedded", **{key: 100_000})
    with pytest.raises(UsageError, match=f"{key} = 100000: frames .* more than 67108864 pixels"):
        open_splits(config)


def test_what_is_lost_on_reading_is_noted_once_a_kind(tmp_path):
    pictures = [Image.fromarray(picture(seed)) for seed in range(3)]
    for name in ("a.webp", "b.webp", "c.png"):
        pictures[0].save(tmp_path / name, save_all=True, append_images=pictures[1:])
    pictures[0].save(tmp_path / "d.png")
    (note,) = open_splits(config_for(tmp_path)).notes
    assert note == (
        f"{tmp_path / 'a.webp'} and 2 other files: is an animation: only the first of its 3 frames "
        "is read"
    )


def test_a_file_under_another_suffix_is_what_it_holds(tmp_path):
    media.write_image(tmp_path / "a.webp", picture(0))
    (tmp_path / "a.webp").rename(tmp_path / "a.gif")
    media.write_video(tmp_path / "b.mp4", np.stack([picture(0)] * 5), fps=10)
    (tmp_path / "b.mp4").rename(tmp_path / "b.jpg")
    source = FileSource(tmp_path)
    assert (source.damaged, source.is_video.tolist()) == ([], [False, True])
    assert source.read(1, np.arange(5), side=16).shape == (5, 16, 24, 3)
