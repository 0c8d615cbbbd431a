"""Clips held out from training, and clips encoded to a goal (paper, section 4)."""

import dataclasses
import itertools
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import ml_collections
import numpy as np

from elastictok_jax.config import apply_overrides, default_source_config, resolve_config
from elastictok_jax.data import media, packing
from elastictok_jax.data.clip_reader import ClipReader
from elastictok_jax.data.mixture import mixture_frame_step
from elastictok_jax.data.sources.splits import SourceSplit, open_splits
from elastictok_jax.errors import UsageError
from elastictok_jax.pixels import pixel_mse, pixel_psnr
from elastictok_jax.tokenizer.api import ElasticTokenizer
from elastictok_jax.tokenizer.goal import Goal
from elastictok_jax.tokenizer.tokens import Tokens

CLIP_KINDS = ("images", "videos")
VIDEOS_SHOWN, IMAGES_SHOWN = 4, 10  # in report.html, report.png and report.mp4


@dataclasses.dataclass(frozen=True)
class EvalClip:
    """A named clip: frames uint8 [T, H, W, 3]; fps is 0 for an image."""

    name: str
    frames: np.ndarray
    fps: float


@dataclasses.dataclass(frozen=True)
class Coded:
    """A clip encoded to one goal: its tokens and its reconstruction, uint8 [T, H, W, 3]."""

    goal: Goal
    tokens: Tokens
    reconstruction: np.ndarray

    def summary(self, original: np.ndarray) -> dict[str, object]:
        """Returns the values shown in a report, as JSON values."""
        error = pixel_mse(original, self.reconstruction)
        return {
            "goal": str(self.goal),
            "target_mse": self.goal.target if self.goal.metric == "mse" else None,
            "tokens": self.tokens.num_tokens,
            "tokens_per_block": float(np.mean(self.tokens.lengths)),
            "bits": self.tokens.bits,
            "mse": error,
            "psnr_db": pixel_psnr(error) if error else None,  # JSON has no infinity
            "blocks": len(self.tokens.codes),
            "blocks_met": int(self.tokens.met.sum()),
            "lengths": self.tokens.lengths.tolist(),
            "block_mse": [float(value) for value in self.tokens.mse],
        }


@dataclasses.dataclass(frozen=True)
class EvaluationOverrides:
    """Overrides of the config keys `evaluation.*`.

    Attributes:
      targets: MSE on the [-1, 1] scale, as numbers or "0.003,0.015"; max_clips: per source;
        max_blocks: per clip; search_blocks: per clip, encoded with every search. None keeps the
        config's value.
    """

    targets: tuple[float, ...] | str | None = None
    max_clips: int | None = None
    max_blocks: int | None = None
    search_blocks: int | None = None

    def of(self, config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
        """Returns a copy of the config with these overrides.

        Raises:
          UsageError: if a value is invalid.
        """
        given = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        changed = ml_collections.ConfigDict(config.to_dict())
        apply_overrides(changed, {f"evaluation.{key}": value for key, value in given.items()})
        return resolve_config(changed)


def evaluation_clips(
    config: ml_collections.ConfigDict, *, data: str | None = None, fps: float | None = None
) -> list[EvalClip]:
    """Reads the clips to evaluate on, in the way that training reads held-out clips.

    Clips have the frame rate and resolution of their source, are cropped at the centre and cut to
    `evaluation.max_blocks` blocks. Each source gives at most `evaluation.max_clips` videos and as
    many images; a note on stderr says if there are more.

    Args:
      data: a folder, glob or data set, used completely and read like the config's own source (its
        first video source if there are several); None for the held-out part of the config's own
        sources.
      fps: maximum frames per second, 0 for no limit; overrides the sources' setting.

    Raises:
      UsageError: if there are no clips, or fps is below 0.
    """
    if fps is not None and not 0 <= fps < math.inf:
        raise UsageError(f"--fps {fps:g}: give frames per second, e.g. 4, or 0 for all frames")
    config = ml_collections.ConfigDict(config.to_dict())
    config.data.cache_mib = 0  # each clip is read once
    if data is not None:
        read_as = _source_to_read_as(config)
        config.data.sources = ml_collections.ConfigDict({"main": default_source_config(path=data)})
        config.data.sources.main.update(read_as)
        config.data.eval_fraction = 0.0
    for source in config.data.sources.values():
        source.fps = source.fps if fps is None else fps
    opened = open_splits(config)
    feeds = opened.heldout
    if data is not None:
        feeds = opened.train + feeds  # the embedded footage has both splits
    for note in opened.notes:
        print(f"note: {note}", file=sys.stderr)
    if not feeds:
        raise UsageError(
            f"the data sources ({', '.join(config.data.sources)}) have nothing held out to "
            "evaluate on: give --data, or train with data.eval_fraction above 0"
        )
    reader = ClipReader(feeds, config, split="heldout")
    most = config.evaluation.max_blocks * config.video.frames_per_block
    clips: list[EvalClip] = []
    for index, item in _chosen(feeds, most=config.evaluation.max_clips):
        feed = feeds[index]
        try:
            frames = reader.read_frames(packing.PackedClip(index, item, 0, 0, 1), most=most)
        except media.MediaError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        name = re.sub(r"\.\w+(@\d+)?$", r"\1", feed.source.name(item))  # without a suffix
        rate = feed.source.fps[item] / mixture_frame_step(feed, np.array(item))
        clips.append(EvalClip(name, frames, float(rate)))
    if not clips:
        raise UsageError("none of the clips to evaluate on can be read: see above")
    folder = os.path.commonpath([os.path.dirname(clip.name) for clip in clips])
    names = _distinct([os.path.relpath(clip.name, folder or ".") for clip in clips])
    return [dataclasses.replace(c, name=name) for c, name in zip(clips, names, strict=True)]


def _source_to_read_as(config: ml_collections.ConfigDict) -> dict[str, float]:
    """Returns the frame rate and resolution of the source whose settings apply to other data."""
    used = [(name, one) for name, one in sorted(config.data.sources.items()) if one.weight]
    first, source = next(((n, one) for n, one in used if one.kind != "image"), used[0])
    chosen = {"fps": source.fps, "resolution": source.resolution}
    if any(one[key] != value for _, one in used for key, value in chosen.items()):
        said = ", ".join(f"{key} {value:g}" for key, value in chosen.items())
        print(f"note: --data is read like data.sources.{first}: {said}", file=sys.stderr)
    return chosen


def _chosen(feeds: Sequence[SourceSplit], *, most: int) -> list[tuple[int, int]]:
    """Selects up to `most` videos and then `most` images per source, as (feed index, item)."""
    chosen: list[tuple[int, int]] = []
    for source in {id(feed.source): feed.source for feed in feeds}.values():
        places = [
            (index, int(item))
            for index, feed in enumerate(feeds)
            if feed.source is source
            for item in feed.items
        ]
        for is_video in (True, False):
            some = [place for place in places if source.is_video[place[1]] == is_video]
            chosen += some[:most]
            if len(some) > most:
                kind = "videos" if is_video else "images"
                print(
                    f"note: {most} of {len(some)} {kind} are measured: raise evaluation.max_clips "
                    "(--max-clips) for more",
                    file=sys.stderr,
                )
    return chosen


def _distinct(names: Sequence[str]) -> list[str]:
    """Makes names distinct by numbering repeated ones."""
    distinct: dict[str, None] = {}
    for name in names:
        others = (f"{name}#{number}" for number in itertools.count(2))
        distinct[next(n for n in itertools.chain([name], others) if n not in distinct)] = None
    return list(distinct)


def code_eval_clip(
    tokenizer: ElasticTokenizer,
    clip: EvalClip,
    *,
    goals: Iterable[Goal],
    progress: Callable[[str, int, int], None],
) -> list[Coded]:
    """Encodes the clip to each goal and decodes it from its tokens.

    `progress` is called after each block with (description, blocks done, all blocks).
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


def clips_to_show(clips: Sequence[EvalClip]) -> list[EvalClip]:
    """Selects a few evenly spaced videos and images to show in the report."""
    chosen: list[EvalClip] = []
    for is_video, most in ((True, VIDEOS_SHOWN), (False, IMAGES_SHOWN)):
        some = [clip for clip in clips if (len(clip.frames) > 1) == is_video]
        places = np.linspace(0, len(some) - 1, min(most, len(some))).round().astype(int)
        chosen += [some[place] for place in places]
    return chosen


def eval_clip_kinds(clips: Sequence[EvalClip]) -> dict[str, str]:
    """Maps each clip's name to its kind: an image is a clip of one frame."""
    return {clip.name: CLIP_KINDS[len(clip.frames) > 1] for clip in clips}
