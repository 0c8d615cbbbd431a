"""LPIPS of random frames.

Dimension key: B rows, N blocks of a row, S inputs of a row, L inputs of a block, D values of an
input, F frames, G runs of blocks that LPIPS looks at one frame of.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from elastictok_jax.losses.base import Reconstruction, Weight
from elastictok_jax.perceptual.lpips import lpips

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class PerceptualLoss:
    """LPIPS of one random frame of every run of blocks, a mean over blocks.

    Attributes:
      net: the network of LPIPS, whose weights are what is frozen.
      every_blocks: blocks of a run.
      block_inputs, block_frames: L and F.
      unpack: frames [..., F, H, W, 3] of inputs [..., L, D].
    """

    weight: Weight
    net: str
    every_blocks: int
    block_inputs: int
    block_frames: int
    unpack: Callable[[Any], Any]
    name = "lpips"
    per = "blocks"

    def __call__(self, made: Reconstruction, *, frozen, keys) -> Array:
        frames, weight_BG = frames_for_perceptual_loss(
            keys("frames"),
            made.rows_B,
            (made.decoded_BSD, made.target_BSD),
            made.segments_BS[:, :: self.block_inputs] != 0,
            every_blocks=self.every_blocks,
            block_frames=self.block_frames,
            unpack=self.unpack,
        )
        images = [frame.reshape(-1, *frame.shape[2:]) for frame in frames]
        distance_BG = lpips(frozen, *images, net=self.net).reshape(weight_BG.shape)
        return jnp.sum(jnp.where(weight_BG > 0, weight_BG * distance_BG, 0.0))


def frames_for_perceptual_loss(
    key: Array,
    rows_B: Array,
    videos_BSD: tuple[Array, ...],
    valid_BN: Array,
    *,
    every_blocks: int,
    block_frames: int,
    unpack: Callable[[Any], Any],
) -> tuple[tuple[Array, ...], Array]:
    """Draws one frame of each run of `every_blocks` blocks of a row.

    A run's frame is a random one of a random valid block, drawn by global block index. A row's last
    run is shorter if the number does not divide the row's blocks.

    Args:
      valid_BN: bool, blocks that are not padding.
      unpack: frames [..., F, H, W, 3] of inputs [..., L, D].

    Returns:
      The drawn frames [B, G, H, W, 3] of each of `videos_BSD`, and float32 [B, G]: how many valid
      blocks each stands for, 0 for a run of padding. The weighted sum over runs of any function of
      frames has the expectation of its sum over valid blocks of its mean over their frames.
    """
    rows, blocks = valid_BN.shape
    run = min(every_blocks, blocks)
    short = -blocks % run  # blocks that the last run lacks

    def draw(index: Array) -> tuple[Array, Array]:
        block_key, frame_key = jax.random.split(jax.random.fold_in(key, index))
        return jax.random.uniform(block_key), jax.random.randint(frame_key, (), 0, block_frames)

    def in_runs(values_BN: Array, fill=0) -> Array:
        pad = [(0, 0), (0, short), *[(0, 0)] * (values_BN.ndim - 2)]
        padded = jnp.pad(values_BN, pad, constant_values=fill)
        return padded.reshape(rows, -1, run, *values_BN.shape[2:])

    def of_run(values_BN: Array, index_BG: Array) -> Array:
        """Returns the value at `index` within each run."""
        if run == 1:
            return values_BN
        return jax.vmap(jax.vmap(lambda values, index: values[index]))(in_runs(values_BN), index_BG)

    score_BN, frame_BN = jax.vmap(jax.vmap(draw))(rows_B[:, None] * blocks + jnp.arange(blocks))
    block_BG = jnp.argmax(in_runs(score_BN + valid_BN, fill=-1), axis=2)
    frame_BG = of_run(frame_BN, block_BG)

    def take(video_BSD: Array) -> Array:
        blocks_BNLD = video_BSD.reshape(rows, blocks, -1, video_BSD.shape[-1])
        clip_BGFHWC = unpack(of_run(blocks_BNLD, block_BG))
        return jax.vmap(jax.vmap(lambda clip, index: clip[index]))(clip_BGFHWC, frame_BG)

    weight_BG = jnp.sum(in_runs(valid_BN), axis=2).astype(jnp.float32)
    return tuple(take(video) for video in videos_BSD), weight_BG
