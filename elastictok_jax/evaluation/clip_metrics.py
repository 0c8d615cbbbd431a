"""The metrics of decoded clips that apply to a config: of each frame, and features of the clip."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import ml_collections
import numpy as np

from elastictok_jax.errors import UsageError
from elastictok_jax.evaluation.frame_metrics import (
    MIN_SIDE,
    MIN_SIDE_MULTISCALE,
    frame_psnr,
    ms_ssim,
    ssim,
)
from elastictok_jax.evaluation.frechet import FVD_METRIC, clip_logits
from elastictok_jax.perceptual.i3d import CLASSES
from elastictok_jax.perceptual.i3d_weights import load_i3d
from elastictok_jax.perceptual.lpips import NETS, lpips
from elastictok_jax.perceptual.lpips_weights import load_lpips
from elastictok_jax.pixels import pixels_to_float

# Returns values [T] by name, of frames uint8 [T, H, W, 3] and their reconstruction.
PerFrame = Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]]
FRAMES_AT_ONCE = 8


@dataclass(frozen=True)
class ClipMetrics:
    """Metrics of decoded frames besides the error, shared by all clips.

    Attributes:
      frames: per-frame metrics.
      features: returns float32 [K, D] of the K stretches of a video that a Frechet distance
        compares; None if its network is not installed.
      name: identifies this set of metrics.
    """

    name: str
    frames: PerFrame
    features: Callable[[np.ndarray], np.ndarray] | None


def make_clip_metrics(config: ml_collections.ConfigDict) -> ClipMetrics:
    """Returns the metrics that apply to this config.

    They are PSNR, SSIM and MS-SSIM if frames are large enough, and LPIPS with each network and
    features for the Frechet video distance if their weights have been fetched.
    """
    side = config.video.resolution
    metrics = {"psnr": frame_psnr}
    metrics |= {"ssim": ssim} if side >= MIN_SIDE else {}
    metrics |= {"ms_ssim": ms_ssim} if side >= MIN_SIDE_MULTISCALE else {}
    for net in NETS:
        try:
            params = jax.tree.map(np.asarray, load_lpips(net))
        except UsageError:
            continue  # not fetched
        metrics[f"lpips_{net}"] = partial(_lpips, params, net=net)

    @jax.jit
    def per_frame(x, y):
        return {name: metric(x, y) for name, metric in metrics.items()}

    def frames(original: np.ndarray, decoded: np.ndarray) -> dict[str, np.ndarray]:
        count, values = len(original), []
        for start in range(0, count, FRAMES_AT_ONCE):
            # The last frame is repeated, so that all batches have one size.
            some = np.minimum(np.arange(start, start + FRAMES_AT_ONCE), count - 1)
            values.append(jax.device_get(per_frame(original[some], decoded[some])))
        joined = jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *values)
        return {name: np.asarray(value, np.float64) for name, value in joined.items()}

    features = _video_features()
    name = " ".join([*metrics, *([FVD_METRIC] if features else [])])
    return ClipMetrics(name, frames, features)


def _video_features() -> Callable[[np.ndarray], np.ndarray] | None:
    try:
        params = load_i3d()
    except UsageError:
        return None  # not fetched

    def features(video: np.ndarray) -> np.ndarray:
        batches = list(clip_logits([video], params=params))
        return np.concatenate([np.zeros((0, CLASSES), np.float32), *batches])

    return features


def _lpips(params, x, y, *, net: str) -> jax.Array:
    return lpips(params, pixels_to_float(x), pixels_to_float(y), net=net, precision="highest")
