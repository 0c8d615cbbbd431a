"""Converts pixels to patches and back, without parameters (paper, section 3.1).

Dimension key: B batch, N blocks, F frames a block, S tokens (N blocks x L), D values a patch.
"""

import numpy as np
from einops import rearrange

PATCHES = "... (n t pt) (h ph) (w pw) c -> ... (n t h w) (pt ph pw c)"


def patches_per_block(frames: int, height: int, width: int, *, patch: tuple[int, int, int]) -> int:
    """Returns L = (F / pt)(H / ph)(W / pw).

    Raises:
      ValueError: if a patch does not divide a block.
    """
    sizes = (frames, height, width)
    if any(size % step for size, step in zip(sizes, patch, strict=True)):
        raise ValueError(f"patch {tuple(patch)} does not divide a block of {sizes}")
    return int(np.prod([size // step for size, step in zip(sizes, patch, strict=True)]))


def patchify(video: np.ndarray, *, patch: tuple[int, int, int], frames_per_block: int):
    """Converts [..., T, H, W, 3] to [..., S, D], patches in raster order (t, h, w).

    The values of a patch are in the order (pt, ph, pw, rgb). Works on numpy and JAX arrays of any
    dtype. T must be a multiple of `frames_per_block`.
    """
    pt, ph, pw = patch
    return rearrange(video, PATCHES, t=frames_per_block // pt, pt=pt, ph=ph, pw=pw)


def patchify_into(
    out_SD: np.ndarray, video: np.ndarray, *, patch: tuple[int, int, int], frames_per_block: int
) -> None:
    """Writes `patchify` of uint8 [T, H, W, 3] into contiguous uint8 [S, D], on the host.

    It copies a row of pixels of a patch at a time, several times faster than byte by byte.
    """
    pt, ph, pw = patch
    frames, height, width, _ = video.shape
    run = np.dtype((np.void, 3 * pw))
    runs_THW = video.reshape(frames, height, -1).view(run)  # copies only if the video is flipped
    t, h, w = frames_per_block // pt, height // ph, width // pw
    runs = rearrange(runs_THW, "(n t pt) (h ph) w -> n t h w pt ph", t=t, pt=pt, h=h, ph=ph)
    out_SD.view(run).reshape(-1, t, h, w, pt, ph)[...] = runs


def unpatchify(
    patches, *, patch: tuple[int, int, int], frames_per_block: int, height: int, width: int
):
    """Inverts `patchify`: converts [..., S, D] to [..., T, H, W, 3]."""
    pt, ph, pw = patch
    sizes = dict(t=frames_per_block // pt, h=height // ph, w=width // pw, pt=pt, ph=ph, pw=pw, c=3)
    inverse = " -> ".join(reversed(PATCHES.split(" -> ")))
    return rearrange(patches, inverse, **sizes)
