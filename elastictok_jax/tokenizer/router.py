"""A small head that predicts a block's error at every length (neural regression; paper, 3.4).

Dimension key: B blocks, L tokens a block, F frames, Z latent dims, K knots.

It reads the encoding of the block with all tokens kept, which knows the blocks before it, how much
of the block's energy there is at each scale, still and moving, and how the block before turned out.
It is trained for one frozen tokenizer (`router_training.py`) and of use to no other.
"""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from elastictok_jax.errors import UsageError
from elastictok_jax.storage.safetensors import load_params, save_params
from elastictok_jax.tokenizer.block_codec import BlockEncoder

Array = jax.Array
FILE = "router.safetensors"
FLOOR = 2e-3  # energy below which differences say nothing of the error
SCALES = 6  # halvings of the picture
EXTREME = 5.0  # standard deviations at which a feature is cut off: beyond is nothing to learn from


class Head(nn.Module):
    """float32 [B, K] log errors from features [B, ...]."""

    knots: int
    width: int = 128

    @nn.compact
    def __call__(self, features: Array) -> Array:
        x = nn.gelu(nn.Dense(self.width)(features))
        x = x + nn.gelu(nn.Dense(self.width)(x))
        return nn.Dense(self.knots)(x)


def features_of(block: BlockEncoder) -> np.ndarray:
    """float32 [features] of a block, as `features` has them."""
    return features(block.encoding(), block.video(), previous=block.previous)


def features(
    latents_LZ: np.ndarray, video_FHWC: np.ndarray, *, previous: tuple[int, float] | None
) -> np.ndarray:
    """float32 [features]: mean and spread of the latents; log energy at every scale of the mean
    frame and of what moves; mean colour; then whether there is a block before, its log error and
    the log of its share of tokens.

    Args:
      video_FHWC: uint8.
      previous: length and error of the block before.
    """
    latents = np.asarray(latents_LZ, np.float32)
    video = video_FHWC.astype(np.float32) / 127.5 - 1
    still = video.mean(axis=0, keepdims=True)
    context = np.zeros(3)
    if previous is not None:
        length, error = previous
        context[:] = 1, np.log(max(error, 1e-12)), np.log(length / len(latents))
    parts = [
        *(latents.mean(axis=0), latents.std(axis=0)),
        *(np.log(FLOOR + energies(part)) for part in (still, video - still)),
        *(still.mean(axis=(0, 1, 2)), context),
    ]
    return np.concatenate(parts).astype(np.float32)


def energies(video_FHWC: np.ndarray) -> np.ndarray:
    """Mean square of what halving the picture again and again takes away, scale by scale; then of
    what is left, about its mean, and all together."""
    left = video_FHWC
    squares = [np.mean(left**2)]
    while len(squares) <= SCALES and left.shape[1] % 2 == left.shape[2] % 2 == 0:
        frames, height, width, _ = left.shape
        left = left.reshape(frames, height // 2, 2, width // 2, 2, -1).mean(axis=(2, 4))
        squares.append(np.mean(left**2))
    squares.append(np.mean(video_FHWC.mean(axis=(1, 2)) ** 2))
    bands = -np.diff(squares)  # means of squares only: halving leaves what it keeps orthogonal
    return np.append(bands, bands.sum()).clip(0)


@dataclasses.dataclass(frozen=True)
class Router:
    """A trained head.

    Attributes:
      params: of `Head`, with `center` and `scale` of its features beside them.
      lengths: the K lengths that it speaks of, ascending.
      fingerprint: of the tokenizer that it was trained for.
    """

    params: Any
    lengths: tuple[int, ...]
    fingerprint: str

    def __call__(self, block: BlockEncoder) -> np.ndarray:
        """float64 [high - low + 1]: log error of a block, first of `lengths` to the last."""
        knots_K = predict(self.params, features_of(block)[None], knots=len(self.lengths))[0]
        every = np.log(np.arange(self.lengths[0], self.lengths[-1] + 1))
        return np.interp(every, np.log(self.lengths), np.asarray(knots_K, np.float64))

    @property
    def digest(self) -> str:
        """16 hex digits of what it predicts by."""
        digest = hashlib.sha256(repr((self.fingerprint, self.lengths)).encode())
        for leaf in jax.tree.leaves(self.params):
            digest.update(np.ascontiguousarray(leaf, np.float32).tobytes())
        return digest.hexdigest()[:16]

    def save(self, folder: Path) -> None:
        """Writes FILE into a model's folder."""
        text = {"fingerprint": self.fingerprint, "lengths": ",".join(map(str, self.lengths))}
        save_params(folder / FILE, self.params, metadata=text)

    @classmethod
    def load(cls, folder: Path, *, fingerprint: str, low: int, high: int) -> "Router":
        """The router in a model's folder, for lengths from `low` to `high`.

        Raises:
          UsageError: if it is damaged, or of another model or other lengths.
        """
        params, text = load_params(folder / FILE)
        mend = f"train it again (elastictok train-router {folder}), or delete it"
        if text.get("fingerprint") != fingerprint:
            raise UsageError(
                f"{folder / FILE} belongs to model {text.get('fingerprint')}, this is "
                f"{fingerprint}: {mend}"
            )
        try:
            lengths = tuple(int(length) for length in text["lengths"].split(","))
            router = cls(params, lengths, fingerprint)
            features = np.zeros((1, len(params["center"])), np.float32)
            if predict(params, features, knots=len(lengths)).shape != (1, len(lengths)):
                raise ValueError("its head gives another number of lengths")
        except Exception as error:  # whatever flax says of a tree that does not fit
            raise UsageError(f"{folder / FILE} is damaged ({str(error)[:100]}): {mend}") from None
        if (lengths[0], lengths[-1]) != (low, high):
            raise UsageError(
                f"{folder / FILE} speaks of {lengths[0]} to {lengths[-1]} tokens, the model's "
                f"config of {low} to {high}: {mend}"
            )
        return router


def predict(params, features_BF, *, knots: int) -> Array:
    """float32 [B, K] log errors of blocks with the features given."""
    return _predict(params, jnp.asarray(features_BF), knots)


@jax.jit(static_argnums=2)
def _predict(params, features_BF, knots):
    scaled = jnp.clip((features_BF - params["center"]) / params["scale"], -EXTREME, EXTREME)
    return params["mean"] + Head(knots).apply({"params": params["head"]}, scaled)
