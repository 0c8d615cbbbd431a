"""Which files are trained on and which are held out."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastictok_jax.config import override, resolve
from elastictok_jax.data import media
from elastictok_jax.data.sources import EMBEDDED, held_out, list_media, open_source
from elastictok_jax.errors import UsageError
from elastictok_jax.registry import get_experiment

NAMES = st.lists(st.text("abcdef/.", min_size=1, max_size=12), min_size=1, max_size=40, unique=True)
FRACTIONS = st.floats(0.0, 0.99)


def config_for(source, **overrides):
    config = get_experiment("quickstart")
    override(config, {"data.source": str(source)} | overrides)
    return resolve(config)


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (16, 24, 3), dtype=np.uint8)


@given(NAMES, FRACTIONS)
def test_something_is_left_to_train_on_and_something_to_hold_out(names, fraction):
    apart = held_out(names, fraction=fraction)
    assert apart <= set(names)
    assert len(apart) < len(names)
    if fraction > 0 and len(names) > 1:
        assert apart
    assert apart == held_out(list(reversed(names)), fraction=fraction)


@given(NAMES, NAMES, st.floats(0.05, 0.95))
def test_split_of_a_file_does_not_change_when_files_are_added(names, more, fraction):
    def share(name):  # documented: a hash of the name, nothing else
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64

    before = held_out(names, fraction=fraction)
    after = held_out(list({*names, *more}), fraction=fraction)
    low = {name for name in names if share(name) < fraction}
    if 0 < len(low) < len(names):
        assert before == low
        assert after & set(names) == before


def test_share_that_is_held_out():
    names = [f"clip_{number:04}.mp4" for number in range(2000)]
    for fraction in (0.05, 0.1, 0.5):
        assert len(held_out(names, fraction=fraction)) / 2000 == pytest.approx(fraction, abs=0.03)
    assert held_out(names, fraction=0.05) < held_out(names, fraction=0.5)


def test_folder_is_split_and_stays_split(tmp_path):
    for number in range(12):
        (tmp_path / "deep" / "down").mkdir(parents=True, exist_ok=True)
        media.write_image(tmp_path / "deep" / "down" / f"{number}.png", picture(number))
    (tmp_path / "notes.txt").write_text("no media")
    (tmp_path / ".hidden.png").write_bytes(b"not looked at")
    config = config_for(tmp_path, **{"data.eval_fraction": 0.3})

    def paths(split):
        source = open_source(config, split=split)
        assert not source.videos
        return [info.path for info in source.images]

    train, heldout = paths("train"), paths("heldout")
    assert train and heldout
    assert not set(train) & set(heldout)
    files = [str(path) for path in sorted((tmp_path / "deep" / "down").iterdir())]
    assert sorted(train + heldout) == files
    assert train == sorted(train)

    for number in range(12, 20):
        media.write_image(tmp_path / f"{number}.png", picture(number))
    assert set(train) <= set(paths("train"))
    assert set(heldout) <= set(paths("heldout"))


def test_split_does_not_depend_on_where_the_folder_lies(tmp_path):
    splits = []
    for folder in (tmp_path / "a", tmp_path / "elsewhere" / "b"):
        folder.mkdir(parents=True)
        for number in range(8):
            media.write_image(folder / f"{number}.png", picture(number))
        source = open_source(config_for(folder, **{"data.eval_fraction": 0.4}), split="heldout")
        splits.append([info.path.removeprefix(str(folder)) for info in source.images])
    assert splits[0] == splits[1] != []


def test_embedded_splits_share_no_file_and_no_frame():
    files = {split: list_media(EMBEDDED / split) for split in ("train", "heldout")}
    assert all(files.values())
    frames = {}
    for split, paths in files.items():
        frames[split] = set()
        for path in paths:
            pixels = media.read_frames(path)
            frames[split] |= {hashlib.sha256(frame.tobytes()).digest() for frame in pixels}
    contents = {
        split: {hashlib.sha256(path.read_bytes()).digest() for path in paths}
        for split, paths in files.items()
    }
    names = {split: {path.name for path in paths} for split, paths in files.items()}
    for parts in (contents, frames, names):
        assert not parts["train"] & parts["heldout"]
    # Both kinds of clips are in both splits, and nothing in the folder is left out.
    for split, paths in files.items():
        source = open_source(config_for("embedded"), split=split)
        assert source.images and source.videos
        assert len(source.images) + len(source.videos) == len(paths)


def test_nothing_to_read_is_said(tmp_path):
    with pytest.raises(UsageError, match=r"data folder .*missing does not exist: give a folder"):
        list_media(tmp_path / "missing")
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UsageError, match=r"holds no image or video: put files there .*\.mp4"):
        list_media(tmp_path)
