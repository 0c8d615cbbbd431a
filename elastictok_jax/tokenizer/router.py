"""A small head that predicts a block's error at every length (neural regression; paper, 3.4).

Dimension key: B blocks, L tokens a block, G groups of tokens, Z latent dims, K knots.

It reads the encoding of the block with all tokens kept, which knows the blocks before it, how
uneven the block's patches are, and how the block before turned out. It is trained for one frozen
tokenizer (`router_training.py`) and of use to no other.
"""

import dataclasses
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from elastictok_jax.errors import UsageError
from elastictok_jax.tokenizer.coder import Block
from elastictok_jax.weights.safetensors import load_params, save_params

Array = jax.Array
FILE = "router.safetensors"
GROUPS = 16  # stretches of tokens that are summed up each on its own: the tail is what is dropped
CONTEXT = 3


class Head(nn.Module):
    """float32 [B, K] log errors from features [B, ...]."""

    knots: int
    width: int = 256

    @nn.compact
    def __call__(self, features: Array) -> Array:
        x = nn.gelu(nn.Dense(self.width)(features))
        x = x + nn.gelu(nn.Dense(self.width)(x))
        return nn.Dense(self.knots)(x)


def features_of(block: Block) -> np.ndarray:
    """float32 [features] of a block: per group, mean and spread of its latents and the log of how
    uneven its patches are; then whether there is a block before, its log error and log length."""
    latents = np.asarray(block.encoding(), np.float32)
    patches = block.pixels()
    groups = np.array_split(np.arange(len(latents)), min(GROUPS, len(latents)))
    uneven = np.log(1e-3 + patches.std(axis=1) / 127.5)
    parts = [
        np.concatenate([latents[g].mean(axis=0), latents[g].std(axis=0), [uneven[g].mean()]])
        for g in groups
    ]
    context = np.zeros(CONTEXT)
    if block.previous is not None:
        length, error = block.previous
        context[:] = 1, np.log(max(error, 1e-12)), np.log(length / len(latents))
    return np.concatenate([*parts, context]).astype(np.float32)


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

    def __call__(self, block: Block) -> np.ndarray:
        """float64 [high - low + 1]: log error of a block, first of `lengths` to the last."""
        knots_K = predict(self.params, features_of(block)[None], knots=len(self.lengths))[0]
        every = np.log(np.arange(self.lengths[0], self.lengths[-1] + 1))
        return np.interp(every, np.log(self.lengths), np.asarray(knots_K, np.float64))

    def save(self, folder: Path) -> None:
        """Writes FILE into a model's folder."""
        text = {"fingerprint": self.fingerprint, "lengths": ",".join(map(str, self.lengths))}
        save_params(folder / FILE, self.params, metadata=text)

    @classmethod
    def load(cls, folder: Path, *, fingerprint: str) -> "Router":
        """The router in a model's folder.

        Raises:
          UsageError: if it is damaged, or of another model.
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
        return router


def predict(params, features_BF, *, knots: int) -> Array:
    """float32 [B, K] log errors of blocks with the features given."""
    return _predict(params, jnp.asarray(features_BF), knots)


@jax.jit(static_argnums=2)
def _predict(params, features_BF, knots):
    scaled = (features_BF - params["center"]) / params["scale"]
    return params["mean"] + Head(knots).apply({"params": params["head"]}, scaled)
