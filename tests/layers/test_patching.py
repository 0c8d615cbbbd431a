"""Pixels to tokens and back, against explicit loops."""

import jax.numpy as jnp
import numpy as np
import pytest
from einops import EinopsError
from hypothesis import given, settings
from hypothesis import strategies as st

from elastictok_jax.layers.patching import patches_per_block, patchify, patchify_into, unpatchify
from elastictok_jax.pixels import pixels_to_float, pixels_to_uint8

sizes = st.integers(1, 3)
layouts = st.fixed_dictionaries(
    {"patch": st.tuples(sizes, sizes, sizes), "grid": st.tuples(sizes, sizes, sizes)}
)


def video_of(patch, grid, *, blocks, lead=()):
    frames, height, width = (a * b for a, b in zip(patch, grid, strict=True))
    shape = (*lead, blocks * frames, height, width, 3)
    return np.arange(np.prod(shape), dtype=np.int32).reshape(shape), frames


@given(layout=layouts, blocks=sizes, lead=st.sampled_from([(), (2,), (2, 1)]))
@settings(max_examples=60)
def test_round_trip(layout, blocks, lead):
    patch, grid = layout["patch"], layout["grid"]
    video, frames = video_of(patch, grid, blocks=blocks, lead=lead)
    tokens = patchify(video, patch=patch, frames_per_block=frames)
    height, width = video.shape[-3:-1]
    per_block = patches_per_block(frames, height, width, patch=patch)
    assert per_block == np.prod(grid)
    assert tokens.shape == (*lead, blocks * per_block, 3 * np.prod(patch))
    assert tokens.dtype == video.dtype
    back = unpatchify(tokens, patch=patch, frames_per_block=frames, height=height, width=width)
    np.testing.assert_array_equal(back, video)


@given(layout=layouts, blocks=sizes)
@settings(max_examples=30)
def test_order_is_raster_t_h_w_of_pt_ph_pw_rgb(layout, blocks):
    patch, grid = layout["patch"], layout["grid"]
    (pt, ph, pw), (t, h, w) = patch, grid
    video, frames = video_of(patch, grid, blocks=blocks)
    want = []
    for first in range(0, blocks * frames, frames):
        for i in range(t):
            for j in range(h):
                for k in range(w):
                    want.append(
                        [
                            video[first + i * pt + a, j * ph + b, k * pw + c, rgb]
                            for a in range(pt)
                            for b in range(ph)
                            for c in range(pw)
                            for rgb in range(3)
                        ]
                    )
    np.testing.assert_array_equal(patchify(video, patch=patch, frames_per_block=frames), want)


def test_jax_arrays_work_and_blocks_stay_apart():
    video, frames = video_of((1, 2, 2), (2, 2, 2), blocks=3)
    tokens = patchify(jnp.asarray(video), patch=(1, 2, 2), frames_per_block=frames)
    second = patchify(video[frames : 2 * frames], patch=(1, 2, 2), frames_per_block=frames)
    np.testing.assert_array_equal(tokens[8:16], second)


def test_all_256_pixel_values_survive_and_span_minus_one_to_one():
    pixels = np.arange(256, dtype=np.uint8)
    values = pixels_to_float(jnp.asarray(pixels))
    assert values.dtype == jnp.float32
    assert (float(values[0]), float(values[-1])) == (-1.0, 1.0)
    np.testing.assert_allclose(values, np.arange(256) / 127.5 - 1, atol=1e-7)
    back = pixels_to_uint8(values)
    assert back.dtype == jnp.uint8
    np.testing.assert_array_equal(back, pixels)


@given(value=st.floats(-4, 4, width=32))
@settings(max_examples=100)
def test_to_uint8_clips_and_rounds_to_nearest(value):
    exact = (min(max(value, -1.0), 1.0) + 1.0) * 127.5
    assert abs(int(pixels_to_uint8(jnp.float32(value))) - exact) <= 0.5 + 1e-5


@pytest.mark.parametrize("sizes", [(3, 8, 8), (4, 9, 8), (4, 8, 7)])
def test_patch_that_does_not_divide(sizes):
    with pytest.raises(ValueError, match=r"patch \(2, 4, 4\) does not divide a block of"):
        patches_per_block(*sizes, patch=(2, 4, 4))


@pytest.mark.parametrize(("frames", "side"), [(2, 8), (5, 8), (6, 8), (4, 10)])
def test_video_that_is_not_whole_blocks_or_patches(frames, side):
    video = np.zeros((frames, side, side, 3), np.uint8)
    with pytest.raises(EinopsError, match="can't divide axis"):
        patchify(video, patch=(2, 4, 4), frames_per_block=4)


@pytest.mark.parametrize("patch", [(1, 8, 8), (2, 4, 8), (4, 1, 1)])
@pytest.mark.parametrize("flip", [False, True])
def test_patchify_into_writes_what_patchify_gives(patch, flip):
    video = np.random.default_rng(0).integers(0, 256, (8, 20, 30, 3), dtype=np.uint8)
    video = video[:, 2:18, 3:27][:, :, :: -1 if flip else 1]  # a crop, as the pipeline has it
    expected = patchify(video, patch=patch, frames_per_block=4)
    out = np.zeros((expected.shape[0] + 2, expected.shape[1]), np.uint8)
    patchify_into(out[1:-1], video, patch=patch, frames_per_block=4)
    np.testing.assert_array_equal(out[1:-1], expected)
    assert not out[0].any() and not out[-1].any()
