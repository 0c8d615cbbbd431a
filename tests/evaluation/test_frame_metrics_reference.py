"""Metrics against scikit-image, torchmetrics and the LPIPS authors' package, on real photographs.

They are not needed to use elastictok_jax: `pip install -e '.[reference]'` gets them. The PyPI
package `lpips` would download torchvision's AlexNet; here its network gets ours instead, while
the heads are its own. Run with -s to see the differences.
"""

import contextlib

import numpy as np
import pytest

from elastictok_jax.data import media
from elastictok_jax.data.sources.file_source import EMBEDDED
from elastictok_jax.evaluation.frame_metrics import frame_mse, frame_psnr, ms_ssim, ssim
from elastictok_jax.perceptual.lpips import lpips, lpips_network_shapes
from elastictok_jax.perceptual.lpips_weights import load_lpips

torch = pytest.importorskip("torch")
skimage = pytest.importorskip("skimage.metrics")
torchmetrics = pytest.importorskip("torchmetrics.functional.image")

PHOTOS = sorted((EMBEDDED / "heldout").glob("*.jpg"))
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=["256x256", "181x240"])
def pair(request):
    """Photographs, and the same darker, noisy, and blurred: uint8 [B, H, W, 3] each."""
    height, width = map(int, request.param.split("x"))
    original = np.stack([media.read_frames(path)[0][:height, :width] for path in PHOTOS])
    rng = np.random.default_rng(0)
    changed = original * 0.9 + rng.normal(0, 12, original.shape)
    changed[1::2] = (changed[1::2] + np.roll(changed[1::2], 2, axis=2)) / 2
    return original, np.clip(changed, 0, 255).astype(np.uint8)


def to_torch(frames):
    """float64 [B, 3, H, W] in [0, 1]."""
    return torch.from_numpy(frames / 255.0).permute(0, 3, 1, 2)


def assert_close(name, ours, theirs):
    difference = np.abs(np.asarray(ours, np.float64) - np.asarray(theirs)).max()
    print(f"\n{name}: ours {np.asarray(ours)}, largest difference {difference:.2e}")
    assert difference <= TOLERANCE


def test_psnr_is_that_of_scikit_image(pair):
    theirs = [
        skimage.peak_signal_noise_ratio(a, b, data_range=255) for a, b in zip(*pair, strict=True)
    ]
    assert_close("PSNR (dB), scikit-image", frame_psnr(*pair), theirs)
    by_torch = torchmetrics.peak_signal_noise_ratio(
        *map(to_torch, pair), data_range=1.0, dim=(1, 2, 3), reduction="none"
    )
    assert_close("PSNR (dB), torchmetrics", frame_psnr(*pair), by_torch)
    squares = [np.mean((a / 127.5 - b / 127.5) ** 2) for a, b in zip(*pair, strict=True)]
    assert_close("MSE, numpy float64", frame_mse(*pair), squares)


def test_ssim_is_that_of_scikit_image(pair):
    theirs = [
        skimage.structural_similarity(
            a,
            b,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=255,
            channel_axis=-1,
        )
        for a, b in zip(*pair, strict=True)
    ]
    assert_close("SSIM, scikit-image", ssim(*pair), theirs)


def test_ssim_is_that_of_torchmetrics_within_the_frame(pair):
    _, map_BCHW = torchmetrics.structural_similarity_index_measure(
        *map(to_torch, pair), data_range=1.0, reduction="none", return_full_image=True
    )
    within = map_BCHW[:, :, 5:-5, 5:-5].mean(dim=(1, 2, 3))
    assert_close("SSIM, torchmetrics without its border", ssim(*pair), within)


def test_ms_ssim_is_that_of_torchmetrics(pair):
    theirs = torchmetrics.multiscale_structural_similarity_index_measure(
        *map(to_torch, pair), data_range=1.0, reduction="none"
    )
    assert_close("MS-SSIM, torchmetrics", ms_ssim(*pair), theirs)


def test_lpips_is_that_of_its_authors_package(pair):
    package = pytest.importorskip("lpips")
    params = load_lpips("alex")
    with contextlib.redirect_stdout(None):
        net = package.LPIPS(net="alex", pnet_rand=True).double().eval()  # without a download
    convolutions = [layer for layer in net.net.modules() if isinstance(layer, torch.nn.Conv2d)]
    names = [name for name in lpips_network_shapes("alex") if name.startswith("conv_")]
    with torch.no_grad():
        for layer, name in zip(convolutions, names, strict=True):
            kernel = torch.from_numpy(params[name]["kernel"]).permute(3, 2, 0, 1)
            layer.weight.copy_(kernel)
            layer.bias.copy_(torch.from_numpy(params[name]["bias"]))
        theirs = net(*(2 * to_torch(frames) - 1 for frames in pair)).reshape(-1).numpy()
    ours = lpips(params, *((frames / 127.5 - 1).astype(np.float32) for frames in pair))
    assert_close("LPIPS (alex), lpips", ours, theirs)
