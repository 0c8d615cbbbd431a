"""Encoder and decoder a block at a time, with the keys and values of the blocks before it.

Dimension key: C candidates, L tokens a block, D patch values, T cached tokens, H heads, K head
width.

What a block sees of earlier ones is what their chosen lengths left in the cache: nothing of them is
computed twice. The cache grows by powers of two up to the window and is then a ring, so memory is
bounded and there is one compiled program for each size of it, not for each clip.
"""

import math
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np

from elastictok_jax.layers.attention.api import SequenceLayout
from elastictok_jax.layers.patching import to_float, to_uint8
from elastictok_jax.layers.transformer import PAST, PRESENT
from elastictok_jax.masking import keep_mask
from elastictok_jax.models.elastictok.model import ElasticTok

Array = jax.Array


class CodecHalf:
    """The compiled programs of encoder ("encode") or decoder ("decode"), for any number of clips.

    Calling one with a cache gives what it makes of `values`, C candidates for the newest block, and
    their keys and values. "encode" takes patches uint8 [L, D] and gives codes [C, L] or [C, L, Z];
    "decode" takes those and gives patches uint8 [C, L, D].
    """

    def __init__(self, model: ElasticTok, method: str, *, tokens_per_block: int) -> None:
        self._model, self._method, self._per_block = model, method, tokens_per_block
        self._run = jax.jit(self._run_fn)

    def __call__(
        self, params, cache: "Cache", values: Array, lengths_C: np.ndarray
    ) -> tuple[Array, Any]:
        position = np.uint32(cache.blocks * self._per_block % 2**32)
        held = np.int32(min(cache.blocks, cache.window_blocks - 1))
        place = (position, held)
        return self._run(params, cache.past, values, lengths_C, place)

    def _run_fn(self, params, past, values, lengths_C, place):
        position, held = place
        count, per_block = lengths_C.shape[0], self._per_block
        room = max((leaf.shape[-2] for leaf in jax.tree.leaves(past)), default=0)
        places = SequenceLayout(
            positions_S=position + jnp.arange(per_block, dtype=jnp.uint32),  # wraps, as angles do
            segments_BS=jnp.ones((count, per_block), jnp.int32),
            tokens_per_block=per_block,
            past_ids_T=(jnp.arange(room) < held * per_block).astype(jnp.int32),
        )
        if self._method == "encode":
            values = jnp.broadcast_to(to_float(values), (count, *values.shape))
        out, new = self._model.apply(
            {"params": params, PAST: past},
            values,
            keep_mask(lengths_C[:, None], tokens_per_block=per_block),
            places,
            method=self._method,
            mutable=[PRESENT],
        )
        return out if self._method == "encode" else to_uint8(out), new[PRESENT]


class Cache:
    """Keys and values of the blocks that the newest one of a clip may see.

    Attributes:
      past: a tree of [..., H, T, K]; empty at first.
      blocks: how many blocks there were, those that the window has left behind included.
      window_blocks: how many blocks see each other, the newest one included.
    """

    def __init__(self, *, window_blocks: int, tokens_per_block: int) -> None:
        self.window_blocks, self._per_block = window_blocks, tokens_per_block
        self.blocks = 0
        self.past: Any = {}

    def keep(self, present) -> None:
        """Adds what a call of `CodecHalf` left of one candidate: a tree of [..., 1, H, L, K]."""
        room = self.window_blocks - 1
        if room:
            slot = self.blocks % room
            held = max((x.shape[-2] for x in jax.tree.leaves(self.past)), default=0)
            if slot * self._per_block >= held:
                more = min(max(1, slot), room - slot) * self._per_block
                self.past = _grow(self.past or _none_of(present), more)
            self.past = _put(self.past, present, np.int32(slot * self._per_block))
        self.blocks += 1

    def write(self, file: BinaryIO) -> None:
        """Moves keys and values to `file`, to be read again before the next use."""
        leaves, self._tree = jax.tree.flatten(self.past)
        self._stored = [(leaf.shape, leaf.dtype, leaf.sharding) for leaf in leaves]
        for leaf in leaves:
            file.write(np.asarray(leaf).reshape(-1).view(np.uint8).data)
        self.past = {}

    def read(self, file: BinaryIO) -> None:
        """Takes what `write` has left in `file`, from its place there on."""
        leaves = []
        for shape, dtype, sharding in self._stored:
            raw = np.empty(math.prod(shape) * dtype.itemsize, np.uint8)
            file.readinto(raw.data)  # type: ignore[attr-defined]
            leaves.append(jax.device_put(raw.view(dtype).reshape(shape), sharding))
        self.past = jax.tree.unflatten(self._tree, leaves)


def _none_of(present):
    return jax.tree.map(
        lambda x: jnp.zeros((*x.shape[:-4], x.shape[-3], 0, x.shape[-1]), x.dtype), present
    )


def _grow(past, tokens: int):
    def grow(x):
        widths = [(0, 0)] * x.ndim
        widths[-2] = (0, tokens)
        return jnp.pad(x, widths)

    return jax.tree.map(grow, past)


@jax.jit(donate_argnums=0)
def _put(past, present, token):
    def put(x, new):
        new = jnp.squeeze(new, axis=-4)
        return jax.lax.dynamic_update_slice_in_dim(x, new, token, axis=-2)

    return jax.tree.map(put, past, present)
