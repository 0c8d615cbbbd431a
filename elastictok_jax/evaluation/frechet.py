"""The Frechet distance between two sets of features, and between two sets of videos by I3D.

Sources: Dowson and Landau 1982 for the distance between two normal distributions; Unterthiner
et al. 2018, "Towards Accurate Generative Models of Video: A New Metric & Challenges" (arXiv
1812.01717, section 3) for videos. Means and covariances are accumulated batch by batch, or on
several machines and merged, in float64 on the host.

Shape suffixes: N samples or clips, D features, T frames, H and W pixels, C = 3 colours.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from elastictok_jax.errors import UsageError
from elastictok_jax.perceptual.i3d import CLASSES, SIDE, I3dParams, i3d_logits

# Figures of different networks do not compare: the name says which one this is.
FVD_METRIC = "fvd_i3d_k400_logits"
CLIP_FRAMES = 16


@dataclasses.dataclass(frozen=True)
class Moments:
    """What a set of samples leaves: their number, mean [D], and sum of centred squares [D, D]."""

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def none(cls, features: int) -> "Moments":
        """The moments of no samples of `features` features."""
        return cls(0, np.zeros(features), np.zeros((features, features)))

    @classmethod
    def of(cls, samples: ArrayLike) -> "Moments":
        """The moments of `samples` [N, D]. Raises UsageError for what is not finite numbers."""
        samples_ND = np.asarray(samples, np.float64)
        if samples_ND.ndim != 2:
            raise UsageError(f"features are [samples, features], not {samples_ND.shape}")
        if not np.isfinite(samples_ND).all():
            raise UsageError("features are not all finite")
        if not len(samples_ND):
            return cls.none(samples_ND.shape[1])
        mean_D = samples_ND.mean(axis=0)
        centred_ND = samples_ND - mean_D
        return cls(len(samples_ND), mean_D, centred_ND.T @ centred_ND)

    def merge(self, other: "Moments") -> "Moments":
        """The moments of both sets together (Chan et al. 1979, the pairwise update)."""
        if self.mean.shape != other.mean.shape:
            raise UsageError(f"features differ: {len(self.mean)} and {len(other.mean)}")
        count = self.count + other.count
        if not count:
            return self
        step_D = other.mean - self.mean
        share = other.count / count
        scatter = self.scatter + other.scatter + np.outer(step_D, step_D) * (self.count * share)
        return Moments(count, self.mean + step_D * share, scatter)

    @property
    def covariance(self) -> np.ndarray:
        """The sample covariance [D, D], of divisor N - 1."""
        return self.scatter / (self.count - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mean_a - mean_b|^2 + trace(A + B - 2 (A B)^(1/2)), A and B the sample covariances.

    The trace of the square root is the sum of singular values of A^(1/2) B^(1/2), by symmetric
    eigendecompositions: no square root of a matrix that is not symmetric, which loses half the
    digits, or gives complex ones, where there are fewer samples than features.

    With few samples it is too large: compare only figures of equally many.

    Raises UsageError for fewer than 2 samples, which have no covariance, and unequal features.
    """
    if a.mean.shape != b.mean.shape:
        raise UsageError(f"features differ: {len(a.mean)} and {len(b.mean)}")
    if min(a.count, b.count) < 2:
        raise UsageError(
            f"a Frechet distance takes 2 samples a set or more, not {a.count} and {b.count}"
        )
    cov_a, cov_b = a.covariance, b.covariance
    overlap = np.linalg.svd(_factor(cov_a).T @ _factor(cov_b), compute_uv=False).sum()
    step_D = a.mean - b.mean
    distance = step_D @ step_D + np.trace(cov_a) + np.trace(cov_b) - 2.0 * overlap
    return max(float(distance), 0.0)  # rounding may bring it below


def frechet_video_distance(
    original_videos: Iterable[np.ndarray],
    decoded_videos: Iterable[np.ndarray],
    *,
    params: I3dParams,
    clips_a_batch: int = 4,
) -> float:
    """The Frechet distance of the I3D logits of two sets of videos, the FVD: `FVD_METRIC`.

    Videos are uint8 [T, H, W, 3], each of its own size; `params` is what
    `elastictok_jax.perceptual.i3d_weights.load_i3d()` returns. Each video is cut into consecutive
    clips of 16 frames from its first frame on, without overlap; frames left over at its end are
    ignored, and so are frame rates. `video_moments` has the rest of
    the protocol, and takes the two sets apart, for streams and for several machines.

    Raises UsageError for fewer than 2 clips in either set and for what are no videos.
    """
    moments = partial(video_moments, params=params, clips_a_batch=clips_a_batch)
    original, decoded = moments(original_videos), moments(decoded_videos)
    if min(original.count, decoded.count) < 2:
        raise UsageError(
            f"an FVD takes 2 clips of {CLIP_FRAMES} frames a set or more, not {original.count} "
            f"and {decoded.count}: give more or longer videos"
        )
    return frechet_distance(original, decoded)


def video_moments(
    videos: Iterable[np.ndarray], *, params: I3dParams, clips_a_batch: int = 4
) -> Moments:
    """The moments of the I3D logits [400] of all clips of 16 frames of `videos`.

    A frame is resized to 224x224 whatever its shape, bilinearly, with half-pixel centres and no
    filter before it is made smaller, in float32, and not rounded. Of `videos`, one at a time is
    held, and `clips_a_batch` resized clips.

    Raises UsageError for what are no videos uint8 [T, H, W, 3].
    """
    params = jax.device_put(params)  # once, not for every batch
    total = Moments.none(CLASSES)
    for logits in clip_logits(videos, params=params, clips_a_batch=clips_a_batch):
        total = total.merge(Moments.of(logits))
    return total


def clip_logits(
    videos: Iterable[np.ndarray], *, params: I3dParams, clips_a_batch: int = 4
) -> Iterator[np.ndarray]:
    """The logits float32 [N, 400] that `video_moments` takes the moments of, batch by batch."""
    clips = itertools.chain.from_iterable(map(_clips, videos))
    for batch in _batches(clips, size=clips_a_batch):
        # The last batch is filled up, so that there is one program.
        filled = [*batch, *([batch[-1]] * (clips_a_batch - len(batch)))]
        yield np.asarray(_logits(params, jnp.stack(filled)))[: len(batch)]


_logits = jax.jit(i3d_logits)


@jax.jit
def _resized(clip_THWC: jax.Array) -> jax.Array:
    """A uint8 clip as I3D takes it: float32 [T, 224, 224, 3] in [-1, 1]."""
    shape = (len(clip_THWC), SIDE, SIDE, 3)
    pixels = clip_THWC.astype(jnp.float32) / 127.5 - 1.0
    return jax.image.resize(pixels, shape, "bilinear", antialias=False)


def _clips(video: np.ndarray) -> Iterator[jax.Array]:
    if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8 or 0 in video.shape[1:3]:
        raise UsageError(f"videos are uint8 [T, H, W, 3], not {video.dtype} {video.shape}")
    for start in range(0, len(video) - CLIP_FRAMES + 1, CLIP_FRAMES):
        yield _resized(video[start : start + CLIP_FRAMES])


def _batches(clips: Iterable[jax.Array], *, size: int) -> Iterator[list[jax.Array]]:
    iterator = iter(clips)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _factor(covariance: np.ndarray) -> np.ndarray:
    """A [D, rank] factor F of a covariance F F^T, without the directions that are rounding."""
    values, vectors = np.linalg.eigh(covariance)
    floor = max(values[-1], 0.0) * len(values) * np.finfo(np.float64).eps
    kept = values > floor
    return vectors[:, kept] * np.sqrt(values[kept])
