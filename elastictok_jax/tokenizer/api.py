"""Encodes pixels to Tokens and decodes them, block by block, left to right (paper, section 3.4).

Dimension key: N blocks, T frames, F frames a block, L tokens a block, D patch values.

A block is encoded and decoded with the KV cache of the blocks before it at their chosen lengths,
and is never recomputed because of a later one. The tokens of a clip do not depend, bit for bit, on
other clips in the same call.
"""

import dataclasses
import functools
import hashlib
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from elastictok_jax.data.media.geometry import require_clip_or_image
from elastictok_jax.errors import UsageError
from elastictok_jax.layers.scan_layout import stack_or_unstack
from elastictok_jax.models.open_model import open_model
from elastictok_jax.models.registry import DEFAULT_FAMILY, family_of_config
from elastictok_jax.storage.references import split_reference
from elastictok_jax.tokenizer.allocation import allocate
from elastictok_jax.tokenizer.block_codec import ClipDecoder, ClipEncoder, CodedBlock, CompiledCodec
from elastictok_jax.tokenizer.block_codes import BlockCodes
from elastictok_jax.tokenizer.distortion import Distortion, lpips_distortion
from elastictok_jax.tokenizer.goal import Goal
from elastictok_jax.tokenizer.lanes import Lanes
from elastictok_jax.tokenizer.length_policies import (
    CausalBudget,
    FixedLength,
    LengthPolicy,
    Probe,
    TargetError,
)
from elastictok_jax.tokenizer.router import FILE, Router
from elastictok_jax.tokenizer.search import SEARCHES
from elastictok_jax.tokenizer.tiling import TileGrid, frames_in_blocks
from elastictok_jax.tokenizer.tokens import Tokens, require_tokens_of_same_clip

ProgressCallback = Callable[[int, int], None]
SPENDING_ROUNDS = 4  # times that all clips are measured to spend a budget


class ElasticTokenizer:
    """A trained model as a tokenizer, opened with `from_pretrained`.

    Attributes:
      tokens_per_block: L, the most tokens of a block.
      min_tokens: the fewest that a search or a budget gives a block, as in training.
      window_blocks: how many blocks see each other in encoding, the newest one included, and the
        most that may in decoding; as in training unless set.
    """

    def __init__(self, config: ml_collections.ConfigDict, params) -> None:
        self.config = config
        self.codec = family_of_config(config).codec
        self.params = jax.tree.map(jnp.asarray, params)
        self.geometry = self.codec.geometry
        self.window_blocks = self.geometry.window
        self.router: Router | None = None  # saved by `train-router` in the model's folder
        self.fingerprint = _fingerprint(config, params)
        key = jax.random.key(int(self.fingerprint[:8], 16))
        self._compiled = CompiledCodec(self.codec, self.params, key)

    @property
    def tokens_per_block(self) -> int:
        return self.geometry.tokens

    @property
    def min_tokens(self) -> int:
        return self.geometry.min_tokens

    @classmethod
    def from_pretrained(
        cls, model: str | Path, *, step: int | str | None = None
    ) -> "ElasticTokenizer":
        """Loads a training workdir or an exported folder, and its router.

        In a workdir it reads the newest checkpoint or, if that is damaged, the one before, with a
        note on stderr.

        Args:
          model: a path, PATH@STEP or PATH@best.
          step: of the checkpoint, or "best" for the one with the best `train.best_metric`.

        Raises:
          UsageError: if there is no such model or checkpoint, its weights do not fit its config,
            or its router is damaged or was trained for other weights. A router that does not fit an
            explicit `step` is ignored instead.
        """
        tokenizer, is_newest = cls._load(model, step=step)
        folder, _ = split_reference(model)
        if (folder / FILE).is_file():
            try:
                tokenizer.router = Router.load(
                    folder, fingerprint=tokenizer.fingerprint, **tokenizer._bounds
                )
            except UsageError as error:
                if is_newest:
                    raise
                print(f"note: without its router: {error}", file=sys.stderr)
        return tokenizer

    @classmethod
    def without_router(
        cls, model: str | Path, *, step: int | str | None = None
    ) -> "ElasticTokenizer":
        """Loads a model as `from_pretrained` does, but without its router, to train one."""
        return cls._load(model, step=step)[0]

    @classmethod
    def _load(cls, model: str | Path, *, step: int | str | None) -> tuple["ElasticTokenizer", bool]:
        """Returns the tokenizer, and whether it has the newest weights of its folder."""
        with open_model(model, step=step) as saved:
            params = saved.params()
            return cls(saved.config, params), saved.is_newest

    def on(self, device: jax.Device) -> "ElasticTokenizer":
        """Returns the same tokenizer on another device."""
        other = ElasticTokenizer(self.config, jax.device_put(self.params, device))
        other.window_blocks, other.router = self.window_blocks, self.router
        return other

    def encode(
        self,
        video: np.ndarray | Sequence[np.ndarray],
        *,
        tokens: int | Sequence[int] | None = None,
        max_mse: float | None = None,
        min_psnr: float | None = None,
        max_lpips: float | None = None,
        budget: float | None = None,
        total_tokens: int | None = None,
        search: str = "hybrid",
        fps: float = 0.0,
        progress: ProgressCallback | None = None,
    ) -> Tokens | list[Tokens]:
        """Encodes one clip or several with given lengths, to a quality, or within a budget.

        Exactly one of the goals must be given; the others are None.

        Args:
          video: uint8 [T, H, W, 3], or an image [H, W, 3], of any size: a size that is not a
            multiple of the model's resolution is padded, and a larger frame is coded in tiles. A
            list of clips, or a batch [B, T, H, W, 3], gives a list.
          tokens: tokens of each block, one number for all or one for each, from 1 to L.
          max_mse: highest error of a block, on the [-1, 1] scale after clipping. Each block gets
            the fewest tokens that `search` finds; `Tokens.met` says which blocks meet the target.
          min_psnr: the same in dB; max_lpips: the same for the mean LPIPS of a block's frames.
          budget: mean fraction of L that all blocks together take, exactly; total_tokens: their
            total. They are spent, over all clips, where they lower the error most.
          search: a key of `search.SEARCHES`.
          fps: stored with the tokens.
          progress: called after each block with (blocks done, blocks of the clip).

        Raises:
          UsageError: on bad input or options.
        """
        goal = Goal(tokens, max_mse, min_psnr, max_lpips, budget, total_tokens, search)
        several = isinstance(video, list | tuple) or np.ndim(video) == 5
        clips = [
            require_clip_or_image(np.asarray(clip)) for clip in (video if several else [video])
        ]
        grids = [TileGrid(clip.shape[:3], self.geometry) for clip in clips]
        sizes = [grid.blocks * grid.tiles for grid in grids]
        if goal.spends and clips:
            lengths = self._spend(goal, clips, grids)
        elif goal.tokens is not None:
            lengths = [goal.lengths(size, tokens_per_block=self.tokens_per_block) for size in sizes]
        results = []
        for index, (clip, grid) in enumerate(zip(clips, grids, strict=True)):
            tiles = range(grid.tiles)
            policies: list[LengthPolicy]
            if goal.target is None:
                policies = [FixedLength(lengths[index][tile :: grid.tiles]) for tile in tiles]
            else:
                policies = [self.threshold(goal) for _ in tiles]
            coded = self.code(clip, grid, policies, metric=goal.metric, progress=progress)
            results.append(self.tokens(coded, grid, fps=fps))
        return results if several else results[0]

    def encode_stream(
        self,
        frames: Iterable[np.ndarray],
        *,
        tokens: int | None = None,
        max_mse: float | None = None,
        min_psnr: float | None = None,
        max_lpips: float | None = None,
        budget: float | None = None,
        search: str = "hybrid",
        fps: float = 0.0,
    ) -> Iterator[Tokens]:
        """Encodes frames as they arrive; yields the Tokens of a block after its last frame.

        Goals are as in `encode`, but a budget is spent without knowledge of later blocks, and its
        mean is approached from below. Memory does not grow with the length of the stream. The
        pieces joined by `Tokens.join` equal `encode` of the complete clip, except for budgets.

        Only the KV caches of one tile are in memory. If a frame has several tiles, the others are
        in a temporary file, and a window of blocks is coded at a time, so that caches are not read
        and written for each block; tokens come that much later.

        Args:
          frames: uint8 [H, W, 3] or [t, H, W, 3], all of one size.

        Raises:
          UsageError: on bad input or options.
        """
        goal = Goal(tokens, max_mse, min_psnr, max_lpips, budget, None, search)
        if np.ndim(tokens if tokens is not None else 0):
            raise UsageError("a stream takes one number of tokens for all its blocks")
        lanes: Lanes[tuple[ClipEncoder, LengthPolicy]] | None = None
        blocks = frames_in_blocks(frames, self.geometry.frames)
        for first in blocks:
            tiles = TileGrid(first.shape[:3], self.geometry).tiles
            if lanes is None:
                lanes = Lanes(
                    lambda: (self.coder(goal.metric), self._of_a_stream(goal)),
                    tiles=tiles,
                    coder=lambda lane: lane[0],
                )
            group = [first, *itertools.islice(blocks, self._at_once(tiles) - 1)]
            grids = [TileGrid(block.shape[:3], self.geometry) for block in group]
            coded: list[list[CodedBlock]] = [[] for _ in group]
            for tile in range(tiles):
                with lanes.tile(tile) as (coder, policy):
                    for block, grid, kept in zip(group, grids, coded, strict=True):
                        (pixels,), (inside,) = grid.cut_tile(block, tile)
                        kept.append(policy.keep(coder.block(pixels, inside)))
            for grid, kept in zip(grids, coded, strict=True):
                yield self.tokens(kept, grid, fps=fps)

    def decode(self, tokens: Tokens) -> np.ndarray:
        """Returns the frames uint8 [T, H, W, 3] of stored tokens.

        Raises:
          UsageError: if they come from another model, their lengths or codes are out of range, or
            their window is longer than `window_blocks`.
        """
        return np.concatenate(list(self.decode_stream([tokens])))

    def decode_stream(self, pieces: Iterable[Tokens]) -> Iterator[np.ndarray]:
        """Yields frames uint8 [t, H, W, 3], a block at a time, of a clip's consecutive pieces.

        Raises:
          UsageError: as `decode`, or if the pieces do not form one clip, as in `Tokens.join`.
        """
        lanes: Lanes[ClipDecoder] | None = None
        pieces_checked = self._checked(pieces)
        for first in pieces_checked:
            tiles = first.grid.tiles
            if lanes is None:
                lanes = Lanes(
                    functools.partial(
                        ClipDecoder, self._compiled, window_blocks=first.window_blocks
                    ),
                    tiles=tiles,
                    coder=lambda decoder: decoder,
                )
            group = [first, *itertools.islice(pieces_checked, self._at_once(tiles) - 1)]
            frames: list[list[np.ndarray]] = [[] for _ in group]
            for tile in range(tiles):
                with lanes.tile(tile) as decoder:
                    for block, decoded in zip(group, frames, strict=True):
                        decoded.append(decoder.block(block.codes[tile]))
            for block, decoded in zip(group, frames, strict=True):
                yield block.grid.join(np.stack(decoded), block=block.index)

    def _at_once(self, tiles: int) -> int:
        """Returns how many blocks of a tile are coded before the next tile."""
        return 1 if tiles == 1 else self.window_blocks

    def _checked(self, pieces: Iterable[Tokens]) -> Iterator["_StoredBlock"]:
        """Yields the blocks of a clip's consecutive pieces; see `decode_stream`."""
        first: Tokens | None = None
        ended = False
        blocks = 0
        for number, tokens in enumerate(pieces):
            grid = TileGrid((tokens.frames, tokens.height, tokens.width), self.geometry)
            self._check_tokens(tokens, grid)
            blocks += grid.blocks
            # Memory grows with the window, and files are not trusted.
            if min(tokens.window_blocks, blocks) > self.window_blocks:
                raise UsageError(
                    f"{tokens.window_blocks} blocks of these tokens see each other, of this "
                    f"tokenizer {self.window_blocks} at most: raise its window_blocks "
                    "(--window-blocks)"
                )
            first = first or tokens
            require_tokens_of_same_clip(tokens, first, number=number)
            if ended:
                raise UsageError(f"piece {number} follows one that ends within a block")
            for index in range(grid.blocks):
                codes = tokens.codes[index * grid.tiles : (index + 1) * grid.tiles]
                yield _StoredBlock(codes, grid, index, tokens.window_blocks)
            ended = grid.frames % grid.frames_per_block != 0

    def code(
        self,
        clip_THWC: np.ndarray,
        grid: TileGrid,
        policies: Sequence[LengthPolicy],
        *,
        metric: str,
        progress: ProgressCallback | None = None,
    ) -> list[CodedBlock]:
        """Codes the blocks of a clip; returns them time first.

        Tiles are coded one after another, so that the KV caches of only one are in memory.
        """
        coded = []
        for policy, blocks, inside in zip(policies, *grid.cut(clip_THWC), strict=True):
            coder = self.coder(metric)
            for frames, part in zip(blocks, inside, strict=True):
                coded.append(policy.keep(coder.block(frames, part)))
                if progress is not None:
                    progress(len(coded), grid.blocks * grid.tiles)
        return [coded[index] for index in grid.time_first]

    def coder(self, metric: str) -> ClipEncoder:
        """Returns an encoder for one tile of one clip, which measures "mse" or "lpips"."""
        distortion = self._lpips if metric == "lpips" else None
        return ClipEncoder(self._compiled, window_blocks=self.window_blocks, distortion=distortion)

    @functools.cached_property
    def _lpips(self) -> Distortion:
        return lpips_distortion(self.config)

    @property
    def _bounds(self) -> dict[str, int]:
        return dict(low=self.min_tokens, high=self.tokens_per_block)

    def threshold(self, goal: Goal) -> TargetError:
        """Returns a policy for one tile of one clip.

        Raises:
          UsageError: if the search needs a router and there is none, or none for the metric.
        """
        assert goal.target is not None
        router = None
        if SEARCHES[goal.search].needs_router:
            if goal.metric != "mse" or self.router is None:
                fix = (
                    "give max_mse or min_psnr, or another search"
                    if goal.metric != "mse"
                    else "run elastictok train-router MODEL first"
                )
                raise UsageError(f"search {goal.search!r} predicts the MSE with a router: {fix}")
            router = self.router
        return TargetError(goal.target, search=goal.search, router=router, **self._bounds)

    def _of_a_stream(self, goal: Goal) -> LengthPolicy:
        if goal.target is not None:
            return self.threshold(goal)
        if goal.budget is not None:
            return CausalBudget(goal.budget * self.tokens_per_block, **self._bounds)
        lengths = goal.lengths(1, tokens_per_block=self.tokens_per_block)
        return FixedLength(itertools.repeat(int(lengths[0])))

    def _spend(
        self, goal: Goal, clips: Sequence[np.ndarray], grids: Sequence[TileGrid]
    ) -> list[np.ndarray]:
        """Returns lengths of each clip's blocks, time first, that spend a budget best.

        What a block gains from more tokens depends on the lengths of the blocks before it. Curves
        are therefore measured at equal lengths, then at the lengths that are best by the mean of
        the curves so far, and so on. The lengths of least measured error are returned.
        """
        sizes = [grid.blocks * grid.tiles for grid in grids]
        blocks, ends = sum(sizes), np.cumsum(sizes)[:-1]
        total = goal.total(blocks, **self._bounds)
        lengths = np.full(blocks, total // blocks, np.int32)
        lengths[: total % blocks] += 1
        best, least = lengths, np.inf
        curves_NM = np.zeros((blocks, self.tokens_per_block - self.min_tokens + 1))
        for round_ in range(SPENDING_ROUNDS):
            surveys = []
            for clip, grid, some in zip(clips, grids, np.split(lengths, ends), strict=True):
                tiles = range(grid.tiles)
                of_clip = [Probe(some[tile :: grid.tiles], **self._bounds) for tile in tiles]
                self.code(clip, grid, of_clip, metric="mse")
                surveys += [
                    (survey.curves[block], survey.errors[block])
                    for block in range(grid.blocks)
                    for survey in of_clip
                ]
            error = sum(error for _, error in surveys)
            if error < least:
                best, least = lengths, error
            curves_NM += (np.stack([curve for curve, _ in surveys]) - curves_NM) / (round_ + 1)
            lengths = allocate(curves_NM, total=total, **self._bounds).lengths
        return np.split(best, ends)

    def tokens(self, coded: Sequence[CodedBlock], grid: TileGrid, *, fps: float) -> Tokens:
        """Returns the Tokens of what `code` returned for a clip cut by `grid`."""
        return Tokens(
            codes=[block.codes for block in coded],
            mse=np.asarray([block.mse for block in coded], np.float32),
            met=np.asarray([block.met for block in coded]),
            frames=grid.frames,
            height=grid.height,
            width=grid.width,
            fps=float(fps),
            bits_per_token=self.codec.code.bits,
            fingerprint=self.fingerprint,
            window_blocks=self.window_blocks,
            levels=self.codec.code.levels,
        )

    def _check_tokens(self, tokens: Tokens, grid: TileGrid) -> None:
        if tokens.fingerprint != self.fingerprint:
            raise UsageError(
                f"these tokens were made by model {tokens.fingerprint}, this is "
                f"{self.fingerprint}: decode with the model that encoded them"
            )
        expected = grid.blocks * grid.tiles
        if len(tokens.codes) != expected:
            raise UsageError(f"{len(tokens.codes)} blocks of tokens for a clip of {expected}")
        lengths = tokens.lengths
        if lengths.min() < 1 or lengths.max() > self.tokens_per_block:
            raise UsageError(f"token lengths must lie in [1, {self.tokens_per_block}]")
        self.codec.code.check(BlockCodes.of(tokens.codes).flat)


@dataclasses.dataclass(frozen=True)
class _StoredBlock:
    """The codes of all tiles of one block, and its index in the clip that `grid` cuts."""

    codes: Sequence[np.ndarray]
    grid: TileGrid
    index: int
    window_blocks: int


def _fingerprint(config: ml_collections.ConfigDict, params) -> str:
    """Returns 16 hex digits of a hash of the model's config and weights."""
    model = config.model.to_dict() | {"dtype": config.compute.dtype}
    if model["family"] == DEFAULT_FAMILY:
        del model["family"]  # as before families, so that older tokens still decode
    digest = hashlib.sha256()
    for part in (model, config.video.to_dict()):
        digest.update(repr(sorted(part.items())).encode())
    stacked = stack_or_unstack(params, stacked=True)
    for path, leaf in jax.tree_util.tree_flatten_with_path(stacked)[0]:
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(np.asarray(leaf, np.float32)).tobytes())
    return digest.hexdigest()[:16]
