"""ElasticTok's codec: one block at a time, with the KV cache of the blocks before it.

Dimension key: B rows, N blocks of a row, C candidates, L tokens a block (of which each is a patch),
D patch values, S = N x L, T cached tokens, H heads, K head width, F frames, R side.
"""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from elastictok_jax.layers.attention.api import SequenceLayout
from elastictok_jax.layers.codes import Code
from elastictok_jax.layers.patching import patchify, patchify_into, unpatchify
from elastictok_jax.layers.transformer import PAST, PRESENT
from elastictok_jax.models.autoencoder import autoencoder_geometry
from elastictok_jax.models.base import Geometry
from elastictok_jax.models.elastictok.model import (
    ElasticTok,
    build_elastictok_model,
    init_elastictok_model,
)
from elastictok_jax.pixels import pixels_to_float, pixels_to_uint8

Array = jax.Array


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["kv"], meta_fields=["blocks", "window"]
)
@dataclasses.dataclass(frozen=True)
class Past:
    """What the next block may see of earlier ones.

    The KV cache grows by powers of two up to the window and is then a ring, so memory is bounded
    and there is one compiled program for each size of it, not for each clip.

    Attributes:
      kv: tree of [..., H, T, K] keys and values; empty at first.
      blocks: blocks so far, those that the window has left behind included.
      window: blocks that see each other, the newest one included.
    """

    kv: Any
    blocks: int
    window: int


@dataclasses.dataclass(frozen=True)
class ElasticTokCodec:
    """See `models.base.Codec`."""

    config: ml_collections.FrozenConfigDict

    def __reduce__(self):
        return ElasticTokCodec, (self.config,)  # compiled programs stay in their process

    @functools.cached_property
    def model(self) -> ElasticTok:
        return build_elastictok_model(self.config)

    @functools.cached_property
    def geometry(self) -> Geometry:
        return autoencoder_geometry(self.config, tuple(self.config.model.patch))

    @property
    def code(self) -> Code:
        return self.model.bottleneck.code

    @property
    def knows_length(self) -> bool:
        return self.model.conditioned

    def params_shapes(self) -> Any:
        boxed = jax.eval_shape(
            lambda key: init_elastictok_model(self.model, key), jax.random.key(0)
        )
        return nn.meta.unbox(boxed)

    @functools.cached_property
    def _sizes(self) -> dict[str, Any]:
        video = self.config.video
        return dict(patch=tuple(self.config.model.patch), frames_per_block=video.frames_per_block)

    def pack(self, frames: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        if out is None:
            return patchify(frames, **self._sizes)
        patchify_into(out, frames, **self._sizes)
        return out

    def unpack(self, inputs):
        side = self.geometry.side
        return unpatchify(inputs, **self._sizes, height=side, width=side)

    def start(self, *, window: int) -> tuple[Past, Past]:
        past = Past({}, 0, window)
        return past, past

    def extend(self, past: Past, present: Any) -> Past:
        room, kv, per_block = past.window - 1, past.kv, self.geometry.tokens
        if room:
            slot = past.blocks % room
            held = max((x.shape[-2] for x in jax.tree.leaves(kv)), default=0)
            if slot * per_block >= held:
                more = min(max(1, slot), room - slot) * per_block
                kv = _grow(kv or _none_of(present), more)
            kv = _put(kv, present, np.int32(slot * per_block))
        return Past(kv, past.blocks + 1, past.window)

    def encode(self, params, inputs: Array, keep: np.ndarray, past: Past) -> tuple[Array, Any]:
        return self._encode(params, past.kv, inputs, keep, self._place(past))

    def decode(
        self, params, codes: Array, keep: np.ndarray, past: Past, key: Array
    ) -> tuple[Array, Any]:
        del key  # nothing is sampled
        return self._decode(params, past.kv, codes, keep, self._place(past))

    def _place(self, past: Past) -> tuple[np.uint32, np.int32]:
        """Returns the position of a block's first token, and how many earlier blocks are cached."""
        position = past.blocks * self.geometry.tokens % 2**32  # wraps, as angles do
        return np.uint32(position), np.int32(min(past.blocks, past.window - 1))

    @functools.cached_property
    def _encode(self):
        @jax.jit
        def encode(params, kv, inputs_LD, keep_CL, place):
            values_CLD = jnp.broadcast_to(
                pixels_to_float(inputs_LD), (len(keep_CL), *inputs_LD.shape)
            )
            return self._apply("encode", params, values_CLD, keep_CL, kv=kv, place=place)

        return encode

    @functools.cached_property
    def _decode(self):
        @jax.jit
        def decode(params, kv, codes, keep_CL, place):
            patches_CLD, present = self._apply("decode", params, codes, keep_CL, kv=kv, place=place)
            return self.unpack(pixels_to_uint8(patches_CLD)), present

        return decode

    def _apply(self, method: str, params, values, keep_CL: Array, *, kv, place):
        (position, held), per_block = place, self.geometry.tokens
        room = max((leaf.shape[-2] for leaf in jax.tree.leaves(kv)), default=0)
        layout = SequenceLayout(
            positions_S=position + jnp.arange(per_block, dtype=jnp.uint32),
            segments_BS=jnp.ones(keep_CL.shape, jnp.int32),
            tokens_per_block=per_block,
            past_ids_T=(jnp.arange(room) < held * per_block).astype(jnp.int32),
        )
        variables = {"params": params, PAST: kv}
        made, new = self.model.apply(
            variables, values, keep_CL, layout, method=method, mutable=[PRESENT]
        )
        return made, new[PRESENT]

    def row_layout(self, segments_BS: Array) -> SequenceLayout:
        """Returns the layout of rows of packed clips: positions run through the row."""
        return SequenceLayout(
            positions_S=jnp.arange(segments_BS.shape[1], dtype=jnp.int32),
            segments_BS=segments_BS,
            tokens_per_block=self.geometry.tokens,
        )

    def encode_rows(self, params, inputs: Array, keep: Array, segments: Array) -> Array:
        codes: Any = self.model.apply(
            {"params": params},
            pixels_to_float(inputs),
            keep,
            self.row_layout(segments),
            method="encode",
        )
        return codes

    def decode_rows(self, params, codes: Array, keep: Array, segments: Array) -> Array:
        decoded: Any = self.model.apply(
            {"params": params}, codes, keep, self.row_layout(segments), method="decode"
        )
        return pixels_to_uint8(decoded)

    def flops_per_row(self, half: str) -> float:
        """Counts 2 for each weight of a matrix, and 4 x width a visible key a layer."""
        part = {"encode": "encoder", "decode": "decoder"}[half]
        geometry, model = self.geometry, self.config.model
        weights = count_matrix_weights(self.params_shapes()[part])
        visible_keys = geometry.tokens * (geometry.window + 1) / 2
        attention = 4.0 * model[f"{part}_layers"] * model.width * visible_keys
        return geometry.row_inputs * (2.0 * weights + attention)


def count_matrix_weights(shapes) -> int:
    """Returns how many weights the matrices of a tree of parameters have."""
    leaves = jax.tree_util.tree_flatten_with_path(shapes)[0]
    return sum(math.prod(leaf.shape) for path, leaf in leaves if path[-1].key == "kernel")


def _none_of(present):
    return jax.tree.map(
        lambda x: jnp.zeros((*x.shape[:-4], x.shape[-3], 0, x.shape[-1]), x.dtype), present
    )


def _grow(kv, tokens: int):
    def grow(x):
        widths = [(0, 0)] * x.ndim
        widths[-2] = (0, tokens)
        return jnp.pad(x, widths)

    return jax.tree.map(grow, kv)


@jax.jit(donate_argnums=0)
def _put(kv, present, token):
    def put(x, new):
        new = jnp.squeeze(new, axis=-4)
        return jax.lax.dynamic_update_slice_in_dim(x, new, token, axis=-2)

    return jax.tree.map(put, kv, present)
