"""The Frechet distance against its plain formula, and the laws that it and its sums should keep."""

import jax
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from elastictok_jax.data import media
from elastictok_jax.data.sources.file_source import EMBEDDED
from elastictok_jax.errors import UsageError
from elastictok_jax.evaluation import frechet
from elastictok_jax.evaluation.frechet import (
    Moments,
    frechet_distance,
    frechet_video_distance,
    video_moments,
)
from elastictok_jax.perceptual.i3d import i3d_logits


def by_square_root(a, b):
    """The formula as it stands, with scipy's square root of a matrix."""
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    step = a.mean(axis=0) - b.mean(axis=0)
    return step @ step + np.trace(cov_a + cov_b - 2 * np.real(root))


def samples(count, features, *, rank, seed):
    """Correlated normal samples, of a covariance of `rank` and a mean that is not 0."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, rank)) @ rng.normal(size=(rank, features)) + rng.normal(
        size=features
    )


def distance(a, b):
    return frechet_distance(Moments.of(a), Moments.of(b))


@pytest.mark.parametrize(
    ("count", "features", "rank", "tolerance"),
    [
        (500, 20, 20, 1e-10),
        # Fewer directions, then fewer samples, than features: sqrtm itself loses half the digits.
        (500, 20, 5, 1e-6),
        (30, 60, 60, 1e-6),
    ],
)
def test_is_the_formula(count, features, rank, tolerance):
    a = samples(count, features, rank=rank, seed=0)
    b = samples(count + 7, features, rank=rank, seed=1)
    assert distance(a, b) == pytest.approx(by_square_root(a, b), rel=tolerance)


def test_of_independent_features_is_that_of_their_deviations():
    rng = np.random.default_rng(0)
    signs = np.array(np.meshgrid(*[[-1.0, 1.0]] * 4)).reshape(4, -1).T  # of no covariance
    widths_a, widths_b, step = rng.uniform(0, 5, (3, 4))
    widths_b[0] = 0
    spread = np.sqrt(16 / 15)  # by the divisor N - 1
    expected = np.sum(step**2) + np.sum((spread * (widths_a - widths_b)) ** 2)
    assert distance(signs * widths_a, signs * widths_b + step) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("count", [3, 100, 1000])
def test_of_a_set_with_itself_is_zero(count):
    features = 40 * samples(count, 400, rank=50, seed=2) + 1000
    scale = np.trace(np.cov(features, rowvar=False))
    assert distance(features, features[::-1]) <= 1e-9 * scale


SETS = arrays.arrays(
    np.float64,
    st.tuples(st.integers(2, 9), st.just(4)),
    elements=st.floats(-1e3, 1e3, width=32),
)


@given(a=SETS, b=SETS)
def test_is_symmetric_and_not_negative(a, b):
    scale = 1e-7 * (1 + np.square(a).sum() + np.square(b).sum())
    assert distance(a, b) >= 0
    assert abs(distance(a, b) - distance(b, a)) <= scale
    assert distance(a, a) <= scale


@given(cuts=st.lists(st.integers(0, 60), max_size=6).map(sorted))
def test_sums_do_not_depend_on_the_batches(cuts):
    # A mean far from 0 is what plain sums of squares would drown in.
    features = samples(60, 12, rank=12, seed=3) + 1e6
    batches = np.split(features, cuts)
    total = Moments.none(12)
    for batch in batches:
        total = total.merge(Moments.of(batch))
    assert total.count == 60
    np.testing.assert_allclose(total.mean, features.mean(axis=0), rtol=1e-14)
    expected = np.cov(features - 1e6, rowvar=False)
    np.testing.assert_allclose(total.covariance, expected, atol=1e-7)


def test_merging_is_the_same_from_either_side():
    parts = [Moments.of(samples(n, 5, rank=5, seed=n)) for n in (1, 4, 9)]
    left = parts[0].merge(parts[1]).merge(parts[2])
    right = parts[2].merge(parts[1].merge(parts[0]))
    np.testing.assert_allclose(left.scatter, right.scatter, rtol=1e-12)


@pytest.mark.parametrize(
    ("a", "b", "told"),
    [
        (np.zeros((1, 3)), np.zeros((5, 3)), "at least 2 samples a set, not 1 and 5"),
        (np.zeros((5, 3)), np.zeros((5, 4)), "features differ: 3 and 4"),
        (np.zeros(5), np.zeros(5), r"\[samples, features\], not \(5,\)"),
        (np.full((5, 3), np.nan), np.zeros((5, 3)), "not all finite"),
    ],
)
def test_what_has_no_distance_is_refused(a, b, told):
    with pytest.raises(UsageError, match=told):
        distance(a, b)


@pytest.fixture(scope="module")
def videos():
    """Two held-out videos of other sizes, of 2 clips and 1, with frames left over."""
    kite = media.read_frames(EMBEDDED / "heldout" / "bbb_kite.mp4", count=35)
    city = media.read_frames(EMBEDDED / "heldout" / "city_busy.mp4", count=17)
    return [kite[:, ::2, ::2], city[:, :100]]


def bilinear(frame, side):
    """Sampled at the centres of the new pixels, beyond the edge as on it."""
    for axis in (0, 1):
        old = frame.shape[axis]
        place = np.clip((np.arange(side) + 0.5) * old / side - 0.5, 0, old - 1)
        low = np.floor(place).astype(int)
        high = np.minimum(low + 1, old - 1)
        share = np.expand_dims(place - low, tuple(n for n in range(3) if n != axis))
        frame = frame.take(low, axis) * (1 - share) + frame.take(high, axis) * share
    return frame


def test_videos_are_cut_and_resized_as_documented(videos):
    clips = [clip for video in videos for clip in frechet._clips(video)]
    assert [clip.shape for clip in clips] == [(16, 224, 224, 3)] * 3
    for clip, frame in [(clips[1], videos[0][16]), (clips[2], videos[1][0])]:
        # Places between pixels are float32, and so off by up to 1.5e-5 pixels at pixel 255.
        np.testing.assert_allclose(clip[0], bilinear(frame / 127.5 - 1, 224), atol=6e-5)


def test_clips_of_all_videos_count_once_whatever_the_batches(videos, monkeypatch):
    def pixels(params, clips):
        return clips[:, 8, 100, :200, :2].reshape(-1, 400)

    monkeypatch.setattr(frechet, "_logits", pixels)  # not I3D, which takes seconds a clip
    clips = [clip for video in videos for clip in frechet._clips(video)]
    expected = Moments.of(pixels({}, np.stack(clips)))
    for size in (1, 2, 3, 4):
        found = video_moments(iter(videos), params={}, clips_a_batch=size)
        assert found.count == 3
        np.testing.assert_allclose(found.mean, expected.mean, atol=1e-12)
        np.testing.assert_allclose(found.scatter, expected.scatter, atol=1e-12)


@pytest.mark.slow
def test_video_distance_is_that_of_the_logits(videos, made_up_i3d):
    kite, city = videos
    original, decoded = [kite], [kite // 2, city]  # 2 clips and 3, of which one fills no batch
    clips = [clip for part in (original, decoded) for v in part for clip in frechet._clips(v)]
    logits = np.concatenate(
        [
            jax.jit(i3d_logits)(made_up_i3d, np.stack([clips[i], clips[j]]))
            for i, j in [(0, 2), (1, 3), (4, 4)]
        ]
    )
    expected = by_square_root(logits[[0, 2]], logits[[1, 3, 4]])
    found = frechet_video_distance(original, iter(decoded), params=made_up_i3d, clips_a_batch=2)
    assert found == pytest.approx(expected, rel=1e-4) and found > 1


def test_too_few_clips_are_refused(videos):
    with pytest.raises(UsageError, match="at least 2 clips of 16 frames a set, not 0 and 0"):
        frechet_video_distance([videos[0][:15]] * 3, [], params={})


@pytest.mark.parametrize("shape", [(16, 8, 8), (16, 8, 8, 1), (16, 0, 8, 3)])
def test_what_is_no_video_is_refused(shape):
    with pytest.raises(UsageError, match=r"videos are uint8 \[T, H, W, 3\]"):
        video_moments([np.zeros(shape, np.uint8)], params={})
    with pytest.raises(UsageError, match="not float64"):
        video_moments([np.zeros((16, 8, 8, 3))], params={})
