"""Cuts are found where footage changes."""

import numpy as np

from elastictok_jax.data.prepare.scenes import scene_cuts


def test_scene_cuts_are_found_where_footage_changes():
    dark, light = np.zeros((12, 32, 32, 3), np.uint8), np.full((12, 32, 32, 3), 200, np.uint8)
    np.testing.assert_array_equal(scene_cuts(np.concatenate([dark, light])), [12])
    assert scene_cuts(dark).size == 0
