"""A small head that predicts a block's error at every length (neural regression; paper, 3.4).

Dimension key: B blocks, L tokens a block, F frames, Z latent dims, K knots.

Its features are the full-length encoding of the block, which attends to the earlier blocks, the
energy of the block's static and moving parts at each scale, and the result of the previous block.
It is trained for one frozen tokenizer (`router_training.py`) and fits no other.
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
from elastictok_jax.storage.safetensors import load_safetensors, save_safetensors
from elastictok_jax.tokenizer.block_codec import BlockEncoder

Array = jax.Array
FILE = "router.safetensors"
FLOOR = 2e-3  # energy below which differences do not inform the error
SCALES = 6  # halvings of the picture
EXTREME = 5.0  # standard deviations at which features are clipped: beyond, training data is sparse


class RouterHead(nn.Module):
    """Predicts log errors, float32 [B, K], from features [B, ...]."""

    knots: int
    width: int = 128

    @nn.compact
    def __call__(self, features: Array) -> Array:
        x = nn.gelu(nn.Dense(self.width)(features))
        x = x + nn.gelu(nn.Dense(self.width)(x))
        return nn.Dense(self.knots)(x)


def router_features_of(block: BlockEncoder) -> np.ndarray:
    """Returns the features of a block, float32 [features]; see `router_features`."""
    return router_features(block.encoding(), block.frames, previous=block.previous)


def router_features(
    latents_LZ: np.ndarray, video_FHWC: np.ndarray, *, previous: tuple[int, float] | None
) -> np.ndarray:
    """Returns a block's features, float32 [features].

    They are the mean and standard deviation of the latents; the log energy, at every scale, of the
    mean frame and of the deviations from it; the mean colour; whether there is a previous block,
    its log error and the log of the fraction of tokens it kept.

    Args:
      video_FHWC: uint8.
      previous: length and error of the previous block.
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
        *(np.log(FLOOR + router_octave_energies(part)) for part in (still, video - still)),
        *(still.mean(axis=(0, 1, 2)), context),
    ]
    return np.concatenate(parts).astype(np.float32)


def router_octave_energies(video_FHWC: np.ndarray) -> np.ndarray:
    """Returns the mean square of each octave band of a picture, from fine to coarse.

    A band is what one halving removes; the last two values are the variance of the coarsest picture
    and the sum of all.
    """
    left = video_FHWC
    squares = [np.mean(left**2)]
    while len(squares) <= SCALES and left.shape[1] % 2 == left.shape[2] % 2 == 0:
        frames, height, width, _ = left.shape
        left = left.reshape(frames, height // 2, 2, width // 2, 2, -1).mean(axis=(2, 4))
        squares.append(np.mean(left**2))
    squares.append(np.mean(video_FHWC.mean(axis=(1, 2)) ** 2))
    bands = -np.diff(squares)  # box means are orthogonal projections, so the squares subtract
    return np.append(bands, bands.sum()).clip(0)


@dataclasses.dataclass(frozen=True)
class Router:
    """A trained head.

    Attributes:
      params: the parameters of `RouterHead`, and the `center` and `scale` of its features.
      lengths: the K lengths at which it predicts, ascending.
      fingerprint: of the tokenizer it was trained for.
    """

    params: Any
    lengths: tuple[int, ...]
    fingerprint: str

    def __call__(self, block: BlockEncoder) -> np.ndarray:
        """Predicts a block's log error from the first of `lengths` to the last, float64 [range]."""
        knots_K = predict_errors(
            self.params, router_features_of(block)[None], knots=len(self.lengths)
        )[0]
        every = np.log(np.arange(self.lengths[0], self.lengths[-1] + 1))
        return np.interp(every, np.log(self.lengths), np.asarray(knots_K, np.float64))

    @property
    def digest(self) -> str:
        """16 hex digits over everything that its predictions depend on."""
        digest = hashlib.sha256(repr((self.fingerprint, self.lengths)).encode())
        for leaf in jax.tree.leaves(self.params):
            digest.update(np.ascontiguousarray(leaf, np.float32).tobytes())
        return digest.hexdigest()[:16]

    def save(self, folder: Path) -> None:
        """Writes FILE into a model's folder."""
        text = {"fingerprint": self.fingerprint, "lengths": ",".join(map(str, self.lengths))}
        save_safetensors(folder / FILE, self.params, metadata=text)

    @classmethod
    def load(cls, folder: Path, *, fingerprint: str, low: int, high: int) -> "Router":
        """Loads the router in a model's folder, for lengths from `low` to `high`.

        Raises:
          UsageError: if it is damaged, or belongs to another model or other lengths.
        """
        params, text = load_safetensors(folder / FILE)
        fix = f"train it again (elastictok train-router {folder}), or delete it"
        if text.get("fingerprint") != fingerprint:
            raise UsageError(
                f"{folder / FILE} belongs to model {text.get('fingerprint')}, this is "
                f"{fingerprint}: {fix}"
            )
        try:
            lengths = tuple(int(length) for length in text["lengths"].split(","))
            router = cls(params, lengths, fingerprint)
            features = np.zeros((1, len(params["center"])), np.float32)
            if predict_errors(params, features, knots=len(lengths)).shape != (1, len(lengths)):
                raise ValueError("its head predicts another number of lengths")
        except Exception as error:  # flax raises many types for a tree that does not fit
            raise UsageError(f"{folder / FILE} is damaged ({str(error)[:100]}): {fix}") from None
        if (lengths[0], lengths[-1]) != (low, high):
            raise UsageError(
                f"{folder / FILE} covers {lengths[0]} to {lengths[-1]} tokens, the model's "
                f"config {low} to {high}: {fix}"
            )
        return router


def predict_errors(params, features_BF, *, knots: int) -> Array:
    """Predicts the log errors of blocks from their features, float32 [B, K]."""
    return _predict(params, jnp.asarray(features_BF), knots)


@jax.jit(static_argnums=2)
def _predict(params, features_BF, knots):
    scaled = jnp.clip((features_BF - params["center"]) / params["scale"], -EXTREME, EXTREME)
    return params["mean"] + RouterHead(knots).apply({"params": params["head"]}, scaled)
