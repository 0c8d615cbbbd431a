"""Which clips make up which row of which batch: computed from (seed, row index), never discovered.

A row is a sequence of N blocks, filled left to right with images (one block each) and runs of
video blocks; each is a clip, with its own segment id, that attends to no other.
"""

import dataclasses

import ml_collections
import numpy as np

from elastictok_jax.data.media import MediaInfo
from elastictok_jax.data.sources import SPLITS, Source


@dataclasses.dataclass(frozen=True)
class Clip:
    """A run of blocks from one file.

    Attributes:
      info: the file; start: its first frame; blocks: how many blocks are read.
      across, down: where the square crop lies in the slack of the longer side, in [0, 1].
      flip: mirrored left to right.
    """

    info: MediaInfo
    start: int
    blocks: int
    across: float
    down: float
    flip: bool


def pack_row(
    source: Source, row: int, *, split: str, config: ml_collections.ConfigDict
) -> list[Clip]:
    """The clips of global row `row`: a function of (config.seed, split, row) and the file list.

    Training rows crop, flip and start at random; held-out rows are cropped at the centre.
    """
    rng = np.random.default_rng([config.seed, SPLITS.index(split), row])
    frames, left = config.video.frames_per_block, config.data.sequence_blocks
    training = split == "train"
    clips = []
    while left:
        image = rng.random() < config.data.image_weight
        files = (source.images if image else source.videos) or source.images or source.videos
        info = files[rng.integers(len(files))]
        blocks = 1 if info.kind == "image" else min(left, max(1, info.frames // frames))
        start = rng.integers(max(0, info.frames - blocks * frames) + 1)
        across, down = rng.random(2) if training else (0.5, 0.5)
        flip = training and config.data.flip and rng.random() < 0.5
        clips.append(Clip(info, int(start), blocks, float(across), float(down), bool(flip)))
        left -= blocks
    return clips
