"""What is evaluated: clips that the model has not seen, and a clip coded to a goal (paper, 4)."""

import dataclasses
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import ml_collections
import numpy as np

from elastictok_jax.config import override, resolve, source_config
from elastictok_jax.data import media
from elastictok_jax.data.sources import Feed, Source, open_feeds
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


@dataclasses.dataclass(frozen=True)
class Limits:
    """What an evaluation takes of the keys `evaluation.*` otherwise than the config has it.

    Attributes:
      targets: MSE on the [-1, 1] scale, as numbers or "0.003,0.015"; max_clips: of each source;
        max_blocks: of each clip; search_blocks: of each clip, coded by every search. None leaves
        the config's.
    """

    targets: tuple[float, ...] | str | None = None
    max_clips: int | None = None
    max_blocks: int | None = None
    search_blocks: int | None = None

    def of(self, config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
        """The config with these limits.

        Raises:
          UsageError: if one makes no sense.
        """
        given = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        changed = ml_collections.ConfigDict(config.to_dict())
        override(changed, {f"evaluation.{key}": value for key, value in given.items()})
        return resolve(changed)


def clips_of(config: ml_collections.ConfigDict, *, data: str | None = None) -> list[Clip]:
    """Clips as the model sees them: resized, cropped at the centre, cut to `evaluation.max_blocks`
    blocks; `evaluation.max_clips` videos and as many images of each source at most. How many more
    there are is said on stderr.

    Args:
      data: a folder, glob or data set, none of it left out as if trained on; None for what the
        config's own sources hold out.

    Raises:
      UsageError: if there are none.
    """
    if data is None:
        opened = open_feeds(config)
        feeds = opened.heldout
    else:
        config = ml_collections.ConfigDict(config.to_dict())
        config.data.sources = ml_collections.ConfigDict({"main": source_config(path=data)})
        config.data.eval_fraction = 0.0
        opened = open_feeds(config)
        feeds = opened.train + opened.heldout  # of the embedded footage there are both
    for note in opened.notes:
        print(f"note: {note}", file=sys.stderr)
    if not feeds:
        raise UsageError(
            f"the data sources ({', '.join(config.data.sources)}) have nothing held out to "
            "evaluate on: give --data, or train with data.eval_fraction above 0"
        )
    side = config.video.resolution
    most = config.evaluation.max_blocks * config.video.frames_per_block
    clips: list[Clip] = []
    for source, item in _chosen(feeds, most=config.evaluation.max_clips):
        indices = np.arange(min(source.frames[item], most))
        try:
            frames = source.read(item, indices, side=side)
        except media.MediaError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        frames = media.center_crop(frames, height=side, width=side)
        name = re.sub(r"\.\w+(@\d+)?$", r"\1", source.name(item))  # without a suffix
        clips.append(Clip(name, frames, float(source.fps[item])))
    if not clips:
        raise UsageError("none of the clips to evaluate on can be read: see above")
    folder = os.path.commonpath([os.path.dirname(clip.name) for clip in clips])
    names = _distinct([os.path.relpath(clip.name, folder or ".") for clip in clips])
    return [dataclasses.replace(c, name=name) for c, name in zip(clips, names, strict=True)]


def _chosen(feeds: Sequence[Feed], *, most: int) -> list[tuple[Source, int]]:
    """Items of each source, `most` videos and then `most` images."""
    chosen: list[tuple[Source, int]] = []
    for source in {id(feed.source): feed.source for feed in feeds}.values():
        items = np.concatenate([feed.items for feed in feeds if feed.source is source])
        for is_video in (True, False):
            some = items[source.is_video[items] == is_video]
            chosen += [(source, int(item)) for item in some[:most]]
            if len(some) > most:
                kind = "videos" if is_video else "images"
                print(
                    f"note: {most} of {len(some)} {kind} are measured: raise evaluation.max_clips "
                    "(--max-clips) for more",
                    file=sys.stderr,
                )
    return chosen


def _distinct(names: Sequence[str]) -> list[str]:
    """Names, those that come again with a number."""
    distinct: dict[str, None] = {}
    for name in names:
        others = (f"{name}#{number}" for number in itertools.count(2))
        distinct[next(n for n in itertools.chain([name], others) if n not in distinct)] = None
    return list(distinct)


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
