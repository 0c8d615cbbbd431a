"""Frechet distances between two sets of features, and between two sets of videos by I3D.

Sources: Dowson and Landau 1982 for the distance between two normal distributions; Unterthiner
et al. 2018, "Towards Accurate Generative Models of Video: A New Metric & Challenges" (arXiv
1812.01717, section 3) for videos. Means and covariances are accumulated in float64 on the host,
batch by batch, and can be merged across machines.

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

# The name states the network, since values of different networks are not comparable.
FVD_METRIC = "fvd_i3d_k400_logits"
CLIP_FRAMES = 16


@dataclasses.dataclass(frozen=True)
class Moments:
    """The number of samples, their mean [D], and their scatter matrix [D, D]."""

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def none(cls, features: int) -> "Moments":
        """Returns the moments of an empty set with `features` features."""
        return cls(0, np.zeros(features), np.zeros((features, features)))

    @classmethod
    def of(cls, samples: ArrayLike) -> "Moments":
        """Computes the moments of `samples` [N, D]. Raises UsageError if any is not finite."""
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
        """Returns the moments of the union of both sets (Chan et al. 1979, pairwise update)."""
        if self.mean.shape != other.mean.shape:
            raise UsageError(f"features differ: {len(self.mean)} and {len(other.mean)}")
        count = self.count + other.count
        if not count:
            return self
        step_D = other.mean - self.mean
        weight = other.count / count
        scatter = self.scatter + other.scatter + np.outer(step_D, step_D) * (self.count * weight)
        return Moments(count, self.mean + step_D * weight, scatter)

    @property
    def covariance(self) -> np.ndarray:
        """The sample covariance [D, D], with divisor N - 1."""
        return self.scatter / (self.count - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """Returns |mean_a - mean_b|^2 + trace(A + B - 2 (A B)^(1/2)), with sample covariances A and B.

    The trace of the square root is the sum of the singular values of A^(1/2) B^(1/2), by symmetric
    eigendecompositions. This avoids the square root of an asymmetric matrix, which loses half the
    digits or turns complex if there are fewer samples than features.

    The distance is biased upwards for few samples: compare only values from equally many.

    Raises UsageError for fewer than 2 samples, which have no covariance, and unequal features.
    """
    if a.mean.shape != b.mean.shape:
        raise UsageError(f"features differ: {len(a.mean)} and {len(b.mean)}")
    if min(a.count, b.count) < 2:
        raise UsageError(
            f"a Frechet distance needs at least 2 samples a set, not {a.count} and {b.count}"
        )
    cov_a, cov_b = a.covariance, b.covariance
    overlap = np.linalg.svd(_factor(cov_a).T @ _factor(cov_b), compute_uv=False).sum()
    step_D = a.mean - b.mean
    distance = step_D @ step_D + np.trace(cov_a) + np.trace(cov_b) - 2.0 * overlap
    return max(float(distance), 0.0)  # rounding may make it negative


def frechet_video_distance(
    original_videos: Iterable[np.ndarray],
    decoded_videos: Iterable[np.ndarray],
    *,
    params: I3dParams,
    clips_a_batch: int = 4,
) -> float:
    """Returns the Frechet distance of the I3D logits of two sets of videos (FVD): `FVD_METRIC`.

    Videos are uint8 [T, H, W, 3] of any size; `params` is the result of
    `elastictok_jax.perceptual.i3d_weights.load_i3d()`. Each video is cut into consecutive,
    non-overlapping clips of 16 frames from its first frame on; remaining frames and frame rates are
    ignored. `video_moments` documents the rest of the protocol, and handles the sets separately for
    streams and several machines.

    Raises UsageError for fewer than 2 clips in either set and for invalid videos.
    """
    moments = partial(video_moments, params=params, clips_a_batch=clips_a_batch)
    original, decoded = moments(original_videos), moments(decoded_videos)
    if min(original.count, decoded.count) < 2:
        raise UsageError(
            f"an FVD needs at least 2 clips of {CLIP_FRAMES} frames a set, not {original.count} "
            f"and {decoded.count}: give more or longer videos"
        )
    return frechet_distance(original, decoded)


def video_moments(
    videos: Iterable[np.ndarray], *, params: I3dParams, clips_a_batch: int = 4
) -> Moments:
    """Computes the moments of the I3D logits [400] of all 16-frame clips of `videos`.

    Frames of any shape are resized to 224x224 bilinearly in float32, with half-pixel centres,
    without antialiasing and without rounding. One video and `clips_a_batch` resized clips are held
    at a time.

    Raises UsageError for anything but videos uint8 [T, H, W, 3].
    """
    params = jax.device_put(params)  # once, not for every batch
    total = Moments.none(CLASSES)
    for logits in clip_logits(videos, params=params, clips_a_batch=clips_a_batch):
        total = total.merge(Moments.of(logits))
    return total


def clip_logits(
    videos: Iterable[np.ndarray], *, params: I3dParams, clips_a_batch: int = 4
) -> Iterator[np.ndarray]:
    """Yields the logits behind `video_moments` batch by batch, float32 [N, 400]."""
    clips = itertools.chain.from_iterable(map(_clips, videos))
    for batch in _batches(clips, size=clips_a_batch):
        # The last batch is padded, so that only one program is compiled.
        filled = [*batch, *([batch[-1]] * (clips_a_batch - len(batch)))]
        yield np.asarray(_logits(params, jnp.stack(filled)))[: len(batch)]


_logits = jax.jit(i3d_logits)


@jax.jit
def _resized(clip_THWC: jax.Array) -> jax.Array:
    """Converts a uint8 clip to I3D's input: float32 [T, 224, 224, 3] in [-1, 1]."""
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
    """Returns a factor F [D, rank] of a covariance F F^T, dropping directions of rounding noise."""
    values, vectors = np.linalg.eigh(covariance)
    floor = max(values[-1], 0.0) * len(values) * np.finfo(np.float64).eps
    kept = values > floor
    return vectors[:, kept] * np.sqrt(values[kept])
