"""Which items are held out."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastictok_jax.data.sources.base import name_hash
from elastictok_jax.data.sources.held_out import held_out_items

NAMES = st.lists(st.text("abcdef/.", min_size=1, max_size=12), min_size=1, max_size=40, unique=True)


FRACTIONS = st.floats(0.0, 0.99)


def places(names) -> np.ndarray:
    return np.array([name_hash(name) for name in names], np.uint64)


@given(NAMES, FRACTIONS)
def test_something_is_left_to_train_on_and_something_to_hold_out(names, fraction):
    held = held_out_items(places(names), fraction=fraction)
    assert held.sum() < len(names)
    if fraction > 0 and len(names) > 1:
        assert held.any()
    backwards = held_out_items(places(reversed(names)), fraction=fraction)
    assert (held == backwards[::-1]).all()


@given(NAMES, NAMES, st.floats(0.05, 0.95))
def test_split_of_a_file_does_not_change_when_files_are_added(names, more, fraction):
    def position(name):  # documented: a hash of the name, nothing else
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64

    everything = [*names, *(name for name in more if name not in names)]
    before = held_out_items(places(names), fraction=fraction)
    after = held_out_items(places(everything), fraction=fraction)
    low = np.array([position(name) < fraction for name in names])
    if low.any() and not low.all():
        assert (before == low).all()
        assert (after[: len(names)] == before).all()


def test_clips_of_one_original_stay_together():
    rng = np.random.default_rng(0)
    originals = rng.integers(0, 40, 500)
    held = held_out_items(places([f"{n}.mp4" for n in originals]), fraction=0.3)
    for original in range(40):
        assert len(set(held[originals == original])) == 1
    assert (
        held_out_items(places(["a", "a"]), fraction=0.5).sum() == 0
    )  # one original cannot be split


def test_share_that_is_held_out():
    names = places([f"clip_{number:04}.mp4" for number in range(2000)])
    for fraction in (0.05, 0.1, 0.5):
        assert held_out_items(names, fraction=fraction).mean() == pytest.approx(fraction, abs=0.03)
    few, more = (held_out_items(names, fraction=fraction) for fraction in (0.05, 0.5))
    assert (more | ~few).all() and few.sum() < more.sum()
