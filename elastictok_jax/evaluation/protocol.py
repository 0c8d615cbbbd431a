"""Token use and error at several targets, per block, on clips the model has not seen (paper, 4)."""

import dataclasses
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import ml_collections
import numpy as np

from elastictok_jax.data import media
from elastictok_jax.data.sources import open_feeds
from elastictok_jax.errors import UsageError
from elastictok_jax.evaluation.metrics import mse, psnr
from elastictok_jax.tokenizer.api import ElasticTokenizer
from elastictok_jax.tokenizer.goal import Goal
from elastictok_jax.tokenizer.tokens import Tokens


@dataclasses.dataclass(frozen=True)
class Clip:
    """A named clip: frames uint8 [T, H, W, 3]; fps is 0 for an image."""

    name: str
    frames: np.ndarray
    fps: float


@dataclasses.dataclass(frozen=True)
class Coded:
    """A clip coded to one goal: its tokens and what they decode to, uint8 [T, H, W, 3]."""

    goal: Goal
    tokens: Tokens
    reconstruction: np.ndarray

    def summary(self, original: np.ndarray) -> dict[str, object]:
        """What a report says of it, as JSON values."""
        error = mse(original, self.reconstruction)
        return {
            "goal": str(self.goal),
            "target_mse": self.goal.target if self.goal.metric == "mse" else None,
            "tokens": self.tokens.num_tokens,
            "tokens_per_block": float(np.mean(self.tokens.lengths)),
            "bits": self.tokens.bits,
            "mse": error,
            "psnr_db": psnr(error) if error else None,  # JSON knows no infinity
            "blocks": len(self.tokens.codes),
            "blocks_met": int(self.tokens.met.sum()),
            "lengths": self.tokens.lengths.tolist(),
            "block_mse": [float(value) for value in self.tokens.mse],
        }


def held_out_clips(config: ml_collections.ConfigDict) -> list[Clip]:
    """Held-out items as the model sees them: resized, cropped at the centre, cut to
    `evaluation.max_blocks` blocks; `evaluation.max_clips` of each source at most.

    Raises:
      UsageError: if nothing is held out.
    """
    feeds = open_feeds(config).heldout
    if not feeds:
        raise UsageError(
            f"the data sources ({', '.join(config.data.sources)}) have nothing held out to "
            "evaluate on: train with data.eval_fraction above 0"
        )
    side = config.video.resolution
    most = config.evaluation.max_blocks * config.video.frames_per_block
    clips = []
    for feed in feeds:
        # Videos first, as they say most.
        chosen = feed.items[: config.evaluation.max_clips]
        for item in sorted(chosen, key=lambda item: not feed.source.is_video[item]):
            indices = np.arange(min(feed.source.frames[item], most))
            try:
                frames = feed.source.read(item, indices, side=side)
            except media.MediaError as error:
                print(f"left out: {error}", file=sys.stderr)
                continue
            frames = media.center_crop(frames, height=side, width=side)
            name = re.sub(r"\.\w+(@\d+)?$", r"\1", feed.source.name(item))  # without a suffix
            clips.append(Clip(name, frames, float(feed.source.fps[item])))
    folder = os.path.commonpath([os.path.dirname(clip.name) for clip in clips])
    clips = [dataclasses.replace(c, name=os.path.relpath(c.name, folder or ".")) for c in clips]
    return clips


def code_clip(
    tokenizer: ElasticTokenizer,
    clip: Clip,
    *,
    goals: Iterable[Goal],
    progress: Callable[[str, int, int], None],
) -> list[Coded]:
    """The clip encoded to each goal and decoded from its tokens.

    `progress` is called after each block with (what is coded, blocks done, all blocks).
    """
    coded = []
    for goal in goals:
        tokens = tokenizer.encode(
            clip.frames,
            **dataclasses.asdict(goal),
            fps=clip.fps,
            progress=partial(progress, f"{clip.name} to {goal}"),
        )
        assert isinstance(tokens, Tokens)
        coded.append(Coded(goal, tokens, tokenizer.decode(tokens)))
    return coded


def summarise(coded: Sequence[tuple[Clip, list[Coded]]]) -> dict[str, object]:
    """All figures of an evaluation, by target and by clip."""
    by_target: dict[str, dict[str, float]] = {}
    for index, example in enumerate(coded[0][1]):
        tokens = [results[index].tokens for _, results in coded]
        by_target[f"{example.goal.target:g}"] = {
            "tokens_per_block": float(np.mean(np.concatenate([t.lengths for t in tokens]))),
            "blocks_met_fraction": float(np.mean(np.concatenate([t.met for t in tokens]))),
            "block_mse": float(np.mean(np.concatenate([t.mse for t in tokens]))),
        }
    clips = {
        clip.name: [result.summary(clip.frames) for result in results] for clip, results in coded
    }
    return {"targets": by_target, "clips": clips}
