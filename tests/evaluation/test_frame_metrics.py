"""Figures of frames against stored reference numbers, and the laws they should keep.

The numbers were made once, by hand, on the float32 waves below in [0, 1] as float64, with
scikit-image 0.26.0 (PSNR, SSIM) and torchmetrics 1.9.0 on torch 2.13.0 (MS-SSIM), data range 1.
test_metrics_reference.py compares with them, and with PyPI's lpips, on photographs.
"""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from elastictok_jax.errors import UsageError
from elastictok_jax.evaluation.frame_metrics import frame_mse, frame_psnr, ms_ssim, ssim
from elastictok_jax.pixels import pixel_mse, pixel_psnr

SKIMAGE_PSNR = [26.0205999, 18.7599600]
SKIMAGE_SSIM = [0.80248543, 0.42209201]
TORCHMETRICS_MS_SSIM = [0.92886531, 0.88170382]
TOLERANCE = 1e-5


def waves():
    """Two frames float32 [2, 181, 240, 3] in [-1, 1], and the same with boards and stripes."""
    h, w, c = np.meshgrid(np.arange(181), np.arange(240), np.arange(3), indexing="ij")
    wave = 0.6 * np.sin(h / (3.0 + c)) * np.cos(w / (5.0 + 2 * c)) + 0.3 * np.sin((h + w) / 17.0)
    board = ((h // 8 + w // 8) % 2) * 0.2 - 0.1
    stripes = 0.25 * np.sin(h * w / 29.0) - 0.1
    original = np.stack([wave, wave[::-1]])
    changed = np.clip(np.stack([wave + board, wave[::-1] * 0.7 + stripes]), -1, 1)
    return original.astype(np.float32), changed.astype(np.float32)


@pytest.mark.parametrize(
    ("figure", "known"),
    [(frame_psnr, SKIMAGE_PSNR), (ssim, SKIMAGE_SSIM), (ms_ssim, TORCHMETRICS_MS_SSIM)],
)
def test_agrees_with_the_reference(figure, known):
    np.testing.assert_allclose(jax.jit(figure)(*waves()), known, rtol=TOLERANCE)


def test_error_of_frames_is_that_of_the_clip():
    original, changed = (np.round((x + 1) * 127.5).astype(np.uint8) for x in waves())
    of_frames = np.asarray(frame_mse(original, changed))
    assert of_frames.mean() == pytest.approx(pixel_mse(original, changed), rel=1e-5)
    assert frame_psnr(original, changed)[0] == pytest.approx(pixel_psnr(of_frames[0]), rel=1e-5)
    assert frame_psnr(original, original).tolist() == [np.inf, np.inf]


def test_bytes_and_floats_of_the_same_pixels_agree():
    original, changed = (np.round((x + 1) * 127.5).astype(np.uint8) for x in waves())
    for figure in (frame_mse, ssim, ms_ssim):
        as_bytes = jax.jit(figure)(original, changed)
        mixed = jax.jit(figure)(original, (changed / 127.5 - 1).astype(np.float32))
        np.testing.assert_allclose(as_bytes, mixed, atol=1e-6)


@settings(max_examples=20)
@given(
    frames=arrays.arrays(np.uint8, (2, 2, 13, 12, 3), elements=st.integers(0, 255)),
)
def test_ssim_is_symmetric_and_at_most_that_of_equal_frames(frames):
    x, y = frames
    compiled = jax.jit(ssim)
    one = compiled(x, y)
    np.testing.assert_allclose(one, compiled(y, x), atol=1e-6)
    assert (np.abs(one) <= 1).all()
    assert compiled(x, x).tolist() == [1.0, 1.0]


def test_ms_ssim_of_equal_and_of_opposite_frames():
    original = waves()[0]
    compiled = jax.jit(ms_ssim)
    np.testing.assert_allclose(compiled(original, original), 1.0, atol=1e-5)
    assert compiled(original, -original).tolist() == [0.0, 0.0]  # contrast terms below 0


def test_slope_of_ms_ssim_is_finite_where_contrast_terms_are_negative():
    original = waves()[0][:1, :176, :176]
    slope = jax.jit(jax.jacfwd(lambda gain: ms_ssim(gain * original, -original)))(1.0)
    assert np.isfinite(slope).all()


@pytest.mark.parametrize(
    ("figure", "x", "y", "told"),
    [
        (ssim, np.zeros((1, 10, 40, 3)), np.zeros((1, 10, 40, 3)), "10x40 .* at least 11 a side"),
        (ms_ssim, np.zeros((1, 200, 175, 3)), np.zeros((1, 200, 175, 3)), "at least 176 a side"),
        (frame_mse, np.zeros((1, 4, 4, 3)), np.zeros((1, 4, 5, 3)), "cannot be compared"),
        (frame_mse, np.zeros((4, 4, 3)), np.zeros((4, 4, 3)), r"\[B, H, W, 3\]"),
        (frame_mse, np.zeros((1, 4, 4, 1)), np.zeros((1, 4, 4, 1)), r"\[B, H, W, 3\]"),
        (frame_psnr, np.zeros((1, 4, 4, 3)), np.zeros((1, 4, 4, 3), np.int32), "not int32"),
    ],
)
def test_what_is_no_frames_is_refused(figure, x, y, told):
    with pytest.raises(UsageError, match=told):
        figure(x, y)
