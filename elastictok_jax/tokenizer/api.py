"""ElasticTokenizer: pixels to Tokens and back, block by block, left to right (paper, section 3.4).

Dimension key: T frames, F frames a block, S tokens of the window, L tokens a block, D patch values.

A block is encoded and decoded in a window of the blocks before it, as many as the model was
trained on, with the lengths already chosen for them. Decoding uses the stored codes of the window
in the same compiled program that measured the error, so what was reported is what is decoded.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from einops import rearrange

from elastictok_jax.attention.api import TokenPlaces
from elastictok_jax.config import block_tokens, read_config
from elastictok_jax.errors import UsageError
from elastictok_jax.masking import keep_mask
from elastictok_jax.models.bottlenecks import FSQ
from elastictok_jax.models.elastictok import abstract_params, build_model
from elastictok_jax.models.layer_layout import with_layout
from elastictok_jax.models.patching import patchify, to_float, to_uint8, unpatchify
from elastictok_jax.tokenizer.search import SEARCHES, Choice
from elastictok_jax.tokenizer.tokens import Tokens
from elastictok_jax.training.checkpoint import Checkpointer
from elastictok_jax.training.exported import is_exported, read_exported

# Keys of config.model that say how it runs, not what its codes mean.
HOW_IT_RUNS = ("attention", "remat", "mlp_chunk_tokens", "scan_layers")


class ElasticTokenizer:
    """A trained model as a tokenizer. Build one with `from_pretrained`."""

    def __init__(self, config: ml_collections.ConfigDict, params) -> None:
        self.config = config
        self.model = build_model(config)
        self.params = jax.tree.map(jnp.asarray, params)
        self.tokens_per_block = block_tokens(config)
        self.window_blocks = config.data.sequence_blocks
        self.fingerprint = _fingerprint(config, params)
        self._encode_block = jax.jit(self._encode_block_fn)
        self._decode_block = jax.jit(self._decode_block_fn)
        self._measure = jax.jit(_decoded_mse)

    @classmethod
    def from_pretrained(cls, model: str | Path) -> "ElasticTokenizer":
        """Loads a training workdir (its newest checkpoint) or an exported folder.

        Raises:
          UsageError: if there is no model, or its weights do not fit its config.
        """
        folder = Path(model)
        if not folder.is_dir():
            raise UsageError(f"model {model} does not exist: give a workdir or an exported folder")
        if is_exported(folder):
            config, params = read_exported(folder)
            return cls(config, with_layout(params, stacked=config.model.scan_layers))
        config = read_config(folder / "config.json")
        if not (folder / "checkpoints").is_dir():
            raise UsageError(f"model {model} has no checkpoints yet: train it first")
        checkpoints = Checkpointer.for_reading(folder)
        try:
            step = checkpoints.latest_step()
            if step is None:
                raise UsageError(f"model {model} has no whole checkpoint yet: train it further")
            device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            placed = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
                abstract_params(config),
            )
            return cls(config, checkpoints.restore_params(step, placed))
        finally:
            checkpoints.close()

    def encode(
        self,
        video: np.ndarray | Sequence[np.ndarray],
        *,
        tokens: int | Sequence[int] | None = None,
        max_mse: float | None = None,
        search: str = "binary",
        fps: float = 0.0,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tokens | list[Tokens]:
        """Encodes a clip with a given number of tokens or to a given error.

        Args:
          video: uint8 [T, H, W, 3], or an image [H, W, 3]; any size: what the model's resolution
            does not divide is padded, and a larger frame is coded in tiles. A list, or a batch
            [B, T, H, W, 3], gives a list.
          tokens: tokens a block, one for all or one each, from 1 to L.
          max_mse: highest error of a block, on the [-1, 1] scale. Each block gets the fewest
            tokens the search finds, from `masking.min_tokens` to L, and never misses a target
            that some such length reaches.
          search: "binary" (about log2 L evaluations) or "full" (the exact minimum). Where all
            tokens miss the target, either tries every length before it is given up.
          fps: kept in the tokens.
          progress: called after each block with (blocks done, all blocks of the clip).

        Raises:
          UsageError: on bad input or options.
        """
        if isinstance(video, list | tuple) or np.ndim(video) == 5:
            options: dict[str, Any] = dict(
                tokens=tokens, max_mse=max_mse, search=search, fps=fps, progress=progress
            )
            return [self.encode(clip, **options) for clip in video]  # type: ignore[misc]
        frames_THWC = _checked_video(np.asarray(video))
        if (tokens is None) == (max_mse is None):
            raise UsageError("encode needs either tokens= or max_mse=, and not both")
        if search not in SEARCHES:
            raise UsageError(f"search {search!r}: choose one of {', '.join(SEARCHES)}")
        grid = _Grid(frames_THWC.shape[:3], self.config)
        clips, weights = grid.cut(frames_THWC), grid.cut(np.ones_like(frames_THWC), pad=False)
        fixed = None if tokens is None else self._fixed_lengths(tokens, grid)
        codes: list[np.ndarray] = []
        choices: list[Choice] = []
        for tile in range(grid.tiles):
            for block in self._encode_clip(
                clips[tile],
                weights[tile],
                lengths=None if fixed is None else fixed[tile],
                max_mse=max_mse,
                search=search,
            ):
                codes.append(block[0])
                choices.append(block[1])
                if progress is not None:
                    progress(len(codes), grid.blocks * grid.tiles)
        order = grid.time_first
        return Tokens(
            codes=[codes[index] for index in order],
            mse=np.asarray([choices[index].mse for index in order], np.float32),
            met=np.asarray([choices[index].met for index in order]),
            frames=grid.frames,
            height=grid.height,
            width=grid.width,
            fps=float(fps),
            bits_per_token=self.model.bottleneck.bits_per_token,
            fingerprint=self.fingerprint,
        )

    def decode(self, tokens: Tokens) -> np.ndarray:
        """uint8 [T, H, W, 3] of stored tokens.

        Raises:
          UsageError: if they are of another model, or their lengths or codes are out of range.
        """
        grid = _Grid((tokens.frames, tokens.height, tokens.width), self.config)
        self._check_tokens(tokens, grid)
        tiles: list[list[np.ndarray]] = [[] for _ in range(grid.tiles)]
        windows = [_Window(self) for _ in range(grid.tiles)]
        for index, codes in enumerate(tokens.codes):
            tile = index % grid.tiles
            window = windows[tile]
            window.advance()
            window.put(codes)
            pixels = self._decode_block(self.params, *window.decoder_inputs())
            tiles[tile].append(np.asarray(to_uint8(pixels)))
        return grid.join(np.stack([np.concatenate(blocks) for blocks in tiles]))

    def _encode_clip(
        self,
        patches_SD: np.ndarray,
        weights_SD: np.ndarray,
        *,
        lengths: Sequence[int] | None,
        max_mse: float | None,
        search: str,
    ) -> Iterator[tuple[np.ndarray, Choice]]:
        """Codes and choice of each block of one tile, left to right."""
        per_block = self.tokens_per_block
        window = _Window(self)
        for index in range(len(patches_SD) // per_block):
            span = slice(index * per_block, (index + 1) * per_block)
            window.advance(patches_SD[span])
            weights_LD = weights_SD[span]
            if lengths is not None:
                choice = Choice(lengths[index], self._try(window, lengths[index], weights_LD), True)
            else:
                assert max_mse is not None
                choice = self._search(window, weights_LD, target=max_mse, search=search)
                self._try(window, choice.length, weights_LD)  # leaves its codes in the window
            yield window.block_codes(choice.length), choice

    def _search(
        self, window: "_Window", weights_LD: np.ndarray, *, target: float, search: str
    ) -> Choice:
        low = min(self.config.masking.min_tokens, self.tokens_per_block)
        return SEARCHES[search](
            lambda length: self._try(window, length, weights_LD),
            low=low,
            high=self.tokens_per_block,
            target=target,
        )

    def _try(self, window: "_Window", length: int, weights_LD: np.ndarray) -> float:
        """Error of the newest block at `length`; leaves its codes in the window."""
        window.set_length(length)
        window.put(np.asarray(self._encode_block(self.params, *window.encoder_inputs()))[:length])
        pixels = self._decode_block(self.params, *window.decoder_inputs())
        return float(self._measure(pixels, window.newest_patches(), weights_LD))

    # Programs: one compile each, for any number of blocks and any length.

    def _places(self, blocks_in_use) -> TokenPlaces:
        tokens = jnp.arange(self.window_blocks * self.tokens_per_block, dtype=jnp.int32)
        in_use = tokens < blocks_in_use * self.tokens_per_block
        return TokenPlaces(tokens, in_use.astype(jnp.int32)[None], self.tokens_per_block)

    def _newest(self, values_1S, blocks_in_use):
        start = (blocks_in_use - 1) * self.tokens_per_block
        return jax.lax.dynamic_slice_in_dim(values_1S[0], start, self.tokens_per_block)

    def _encode_block_fn(self, params, patches_SD, lengths_W, blocks_in_use):
        keep_1S = keep_mask(lengths_W[None], tokens_per_block=self.tokens_per_block)
        codes = self.model.apply(
            {"params": params},
            to_float(patches_SD)[None],
            keep_1S,
            self._places(blocks_in_use),
            method="encode",
        )
        return self._newest(codes, blocks_in_use)

    def _decode_block_fn(self, params, codes, lengths_W, blocks_in_use):
        keep_1S = keep_mask(lengths_W[None], tokens_per_block=self.tokens_per_block)
        places = self._places(blocks_in_use)
        pixels = self.model.apply({"params": params}, codes[None], keep_1S, places, method="decode")
        return self._newest(pixels, blocks_in_use)

    def _fixed_lengths(self, tokens: int | Sequence[int], grid: "_Grid") -> np.ndarray:
        """int [tiles, time blocks] of the lengths asked for, in the order they are coded."""
        try:
            lengths = np.broadcast_to(np.asarray(tokens), grid.blocks * grid.tiles)
        except ValueError:
            raise UsageError(
                f"tokens= has {np.size(tokens)} lengths for {grid.blocks * grid.tiles} blocks"
            ) from None
        if (
            lengths.dtype.kind not in "iu"
            or lengths.min() < 1
            or lengths.max() > self.tokens_per_block
        ):
            raise UsageError(
                f"tokens={tokens}: give whole numbers from 1 to {self.tokens_per_block}, "
                "the tokens of a block"
            )
        return lengths.reshape(grid.blocks, grid.tiles).T

    def _check_tokens(self, tokens: Tokens, grid: "_Grid") -> None:
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
        flat = np.concatenate(tokens.codes)
        bottleneck = self.model.bottleneck
        if isinstance(bottleneck, FSQ):
            if flat.ndim != 1 or flat.dtype.kind not in "iu":
                raise UsageError("codes of an FSQ model must be whole numbers")
            if flat.min() < 0 or flat.max() >= bottleneck.codebook_size:
                raise UsageError(f"codes must lie in [0, {bottleneck.codebook_size})")
        elif flat.shape[1:] != (bottleneck.latent_dims,) or not np.isfinite(flat).all():
            raise UsageError(f"codes must be finite, {bottleneck.latent_dims} values a token")


class _Window:
    """The blocks that the newest one may see: patches, chosen lengths and codes."""

    def __init__(self, tokenizer: ElasticTokenizer) -> None:
        self._per_block = tokenizer.tokens_per_block
        self._size = tokenizer.window_blocks
        bottleneck = tokenizer.model.bottleneck
        fsq = isinstance(bottleneck, FSQ)
        tail, dtype = ((), np.int32) if fsq else ((bottleneck.latent_dims,), np.float32)
        tokens = self._size * self._per_block
        self.codes = np.zeros((tokens, *tail), dtype)
        self._patches = np.zeros((tokens, tokenizer.model.patch_values), np.uint8)
        self._lengths = np.zeros(self._size, np.int32)
        self._used = 0

    def _newest(self) -> slice:
        return slice((self._used - 1) * self._per_block, self._used * self._per_block)

    def advance(self, patches_LD: np.ndarray | None = None) -> None:
        """Makes room for the next block; the oldest leaves a full window."""
        if self._used == self._size:
            for array in (self.codes, self._patches):
                array[: -self._per_block] = array[self._per_block :].copy()
            self._lengths[:-1] = self._lengths[1:].copy()
        else:
            self._used += 1
        self.codes[self._newest()] = 0
        if patches_LD is not None:
            self._patches[self._newest()] = patches_LD

    def set_length(self, length: int) -> None:
        self._lengths[self._used - 1] = length

    def put(self, codes: np.ndarray) -> None:
        """Codes of the newest block's first tokens, as many as are kept."""
        block = self.codes[self._newest()]
        block[:] = 0
        block[: len(codes)] = codes
        self.set_length(len(codes))

    def block_codes(self, length: int) -> np.ndarray:
        return self.codes[self._newest()][:length].copy()

    def newest_patches(self) -> np.ndarray:
        return self._patches[self._newest()]

    def encoder_inputs(self) -> tuple[np.ndarray, np.ndarray, int]:
        return self._patches, self._lengths, self._used

    def decoder_inputs(self) -> tuple[np.ndarray, np.ndarray, int]:
        return self.codes, self._lengths, self._used


class _Grid:
    """How a clip of any size is cut into blocks of the model's size, and joined again."""

    def __init__(self, size: tuple[int, int, int], config: ml_collections.ConfigDict) -> None:
        self.frames, self.height, self.width = size
        self._config = config
        side, frames = config.video.resolution, config.video.frames_per_block
        self.blocks = -(-self.frames // frames)
        self.rows, self.columns = -(-self.height // side), -(-self.width // side)
        self.tiles = self.rows * self.columns

    @property
    def time_first(self) -> list[int]:
        """Indices that bring blocks from (tile, time) order to (time, tile) order."""
        order = np.arange(self.tiles * self.blocks).reshape(self.tiles, self.blocks)
        return order.T.reshape(-1).tolist()

    def cut(self, video_THWC: np.ndarray, *, pad: bool = True) -> np.ndarray:
        """[tiles, S, D] patches; beyond the clip its edge is repeated, or zero if not `pad`."""
        side, frames = self._config.video.resolution, self._config.video.frames_per_block
        slack = (
            (0, self.blocks * frames - self.frames),
            (0, self.rows * side - self.height),
            (0, self.columns * side - self.width),
            (0, 0),
        )
        video = np.pad(video_THWC, slack, mode="edge" if pad else "constant")
        tiles = rearrange(video, "t (r h) (k w) c -> (r k) t h w c", r=self.rows, k=self.columns)
        patch = tuple(self._config.model.patch)
        return patchify(tiles, patch=patch, frames_per_block=frames)

    def join(self, patches: np.ndarray) -> np.ndarray:
        """Inverse of `cut`: [tiles, S, D] to [T, H, W, 3], cropped to the clip."""
        side, frames = self._config.video.resolution, self._config.video.frames_per_block
        tiles = unpatchify(
            patches,
            patch=tuple(self._config.model.patch),
            frames_per_block=frames,
            height=side,
            width=side,
        )
        video = rearrange(tiles, "(r k) t h w c -> t (r h) (k w) c", r=self.rows, k=self.columns)
        return video[: self.frames, : self.height, : self.width]


def _decoded_mse(pixels_LD, target_LD, weights_LD):
    """Error of the uint8 pixels that `decode` gives, over those whose weight is one."""
    error = (to_float(to_uint8(pixels_LD)) - to_float(target_LD)) ** 2
    weights = weights_LD.astype(jnp.float32)
    return jnp.sum(error * weights) / jnp.sum(weights)


def _checked_video(video: np.ndarray) -> np.ndarray:
    if video.ndim == 3:
        video = video[None]
    if video.ndim != 4 or video.shape[-1] != 3 or 0 in video.shape or video.dtype != np.uint8:
        raise UsageError(
            f"a clip must be uint8 [T, H, W, 3] (or an image [H, W, 3]) with no empty axis; "
            f"this is {video.dtype} {list(video.shape)}"
        )
    return video


def _fingerprint(config: ml_collections.ConfigDict, params) -> str:
    """16 hex digits of the model's config and weights."""
    digest = hashlib.sha256()
    for part in (config.model, config.video):
        meaning = {k: v for k, v in part.to_dict().items() if k not in HOW_IT_RUNS}
        digest.update(repr(sorted(meaning.items())).encode())
    digest.update(str(config.data.sequence_blocks).encode())
    stacked = with_layout(params, stacked=True)
    for path, leaf in jax.tree_util.tree_flatten_with_path(stacked)[0]:
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(np.asarray(leaf, np.float32)).tobytes())
    return digest.hexdigest()[:16]
