"""Pre-norm transformer layers with block-causal attention (paper, section 3.1).

Dimension key: B batch, S tokens, W width, M SwiGLU width, H heads, K head width.

Parameters are float32 and carry logical axis names; `parallel/sharding.py` maps those to a mesh.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from elastictok_jax.layers.attention.api import SequenceLayout, attend_to_past, attention
from elastictok_jax.layers.attention.kernel import SAVED_NAMES
from elastictok_jax.layers.rotary import apply_rotary_embedding, rotary_pairs_to_halves
from elastictok_jax.layers.scan_layout import STACKED, UNSTACKED
from elastictok_jax.parallel.sharding import logical_axis_shards

Array = jax.Array

# What each setting saves in the forward pass; the backward pass recomputes the rest. The residuals
# of attention are cheap to save and expensive to recompute, above all with a ring.
LAYER_INPUT = "layer_input"
REMAT_POLICIES: dict[str, Callable[..., Any] | None] = {
    "none": None,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
        jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES),
    ),
    "attention": jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[LAYER_INPUT, *SAVED_NAMES],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}

# Collections of rotated keys and values (the KV cache): [H, T, K] per layer of earlier blocks, and
# [B, H, S, K] of the current ones. With `SequenceLayout.past_ids_T`, PAST is read and PRESENT is
# written.
PAST, PRESENT = "past", "present"

# Initial scale of the projections into the residual stream and to pixels: the model starts close to
# a linear patch autoencoder that outputs grey. At full scale the first steps are spent on
# unlearning noise and saturate FSQ latents, from which few codes recover (measured on the quick
# start).
SMALL_INIT = 0.1


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """Sizes and numerics that encoder and decoder layers share.

    Attributes:
      width, mlp_width, heads: W, M, H; head width is W / H and must be even.
      rope_theta: base of the rotary frequencies.
      norm_eps: added to the mean square in RMSNorm.
      attention: a backend name of `attention.api`.
      remat: a key of REMAT_POLICIES.
      mlp_chunk_tokens: most tokens per device that the feed-forward computes at once; 0 for all.
      dtype: of the computation; parameters are always float32.
      scan_layers: whether layers are stacked into one scan; otherwise each is a separate module.
    """

    width: int
    mlp_width: int
    heads: int
    rope_theta: float
    norm_eps: float
    attention: str
    remat: str
    mlp_chunk_tokens: int
    dtype: Any
    scan_layers: bool = True

    def norm(self, name: str) -> nn.RMSNorm:
        """Returns an RMSNorm with a learned scale and statistics in float32."""
        scale_init = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        return nn.RMSNorm(epsilon=self.norm_eps, dtype=self.dtype, scale_init=scale_init, name=name)

    def linear(
        self,
        *features: int,
        axes: tuple[str, ...],
        name: str,
        scale: float = 1.0,
        kernel_view: Callable[[Array], Array] = lambda kernel: kernel,
    ) -> "Linear":
        """Returns a bias-free linear map into `features`, whose kernel has the logical `axes`."""
        return Linear(features, axes, self.dtype, scale, kernel_view, name=name)


class Linear(nn.Module):
    """Applies a bias-free linear map to the last len(axes) - len(features) axes of its input.

    The kernel keeps its axes separate ([W, H, K] for a query), so that each can be sharded over its
    own mesh axis. The initialisation is scaled by fan-in, so that outputs have about unit scale at
    any width. The input is multiplied by `kernel_view(kernel)`.
    """

    features: tuple[int, ...]
    axes: tuple[str, ...]
    dtype: Any
    scale: float
    kernel_view: Callable[[Array], Array]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        contracted = len(self.axes) - len(self.features)
        init = nn.initializers.variance_scaling(
            self.scale**2,
            "fan_in",
            "truncated_normal",
            in_axis=range(contracted),
            out_axis=range(contracted, len(self.axes)),
        )
        shape = (*x.shape[-contracted:], *self.features)
        weights: Any = self.param("kernel", nn.with_logical_partitioning(init, self.axes), shape)
        kernel = self.kernel_view(weights.astype(self.dtype))
        return _contract_axes(x.astype(self.dtype), kernel, contracted)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _contract_axes(x: Array, kernel: Array, count: int) -> Array:
    """Contracts the last `count` axes of `x` with the first ones of `kernel`.

    The kernel's gradient is a product with `x` on the left. JAX's own rule puts the output's
    gradient there; XLA transposes the left operand and then does the elementwise work before it in
    strided order, which makes a feed-forward 1.6 times slower on a CPU.
    """
    return jnp.tensordot(x, kernel, axes=count)


def _contract_forward(x: Array, kernel: Array, count: int):
    return jnp.tensordot(x, kernel, axes=count), (x, kernel)  # visible to remat policies


def _contract_backward(count: int, saved: tuple[Array, Array], grad: Array):
    x, kernel = saved
    lead = tuple(range(x.ndim - count))
    outputs = (tuple(range(len(lead), grad.ndim)), tuple(range(count, kernel.ndim)))
    return jnp.tensordot(grad, kernel, axes=outputs), jnp.tensordot(x, grad, axes=(lead, lead))


_contract_axes.defvjp(_contract_forward, _contract_backward)


class SelfAttention(nn.Module):
    """Multi-head block-causal self-attention with rotary positions."""

    spec: LayerSpec

    @nn.compact
    def __call__(self, x_BSW: Array, places: SequenceLayout) -> Array:
        spec = self.spec
        features = (spec.heads, spec.width // spec.heads)
        axes = ("embed", "heads", "head_width")
        view = rotary_pairs_to_halves  # the order that `apply_rotary_embedding` expects
        query_BSHK = spec.linear(*features, axes=axes, name="query", kernel_view=view)(x_BSW)
        key_BSHK = spec.linear(*features, axes=axes, name="key", kernel_view=view)(x_BSW)
        value_BSHK = spec.linear(*features, axes=axes, name="value")(x_BSW)
        query_BSHK, key_BSHK, value_BSHK = (
            nn.with_logical_constraint(x_BSHK, ("batch", "sequence", "heads", None))
            for x_BSHK in (query_BSHK, key_BSHK, value_BSHK)
        )
        query_BSHK = apply_rotary_embedding(query_BSHK, places.positions_S, theta=spec.rope_theta)
        key_BSHK = apply_rotary_embedding(key_BSHK, places.positions_S, theta=spec.rope_theta)
        if places.past_ids_T is None:
            mixed_BSHK = attention(
                query_BSHK, key_BSHK, value_BSHK, places=places, backend=spec.attention
            )
        else:
            mixed_BSHK = self._with_past(query_BSHK, key_BSHK, value_BSHK, places)
        axes = ("heads", "head_width", "embed")
        return spec.linear(spec.width, axes=axes, name="out", scale=SMALL_INIT)(mixed_BSHK)

    def _with_past(
        self, query_BSHK: Array, key_BSHK: Array, value_BSHK: Array, places: SequenceLayout
    ) -> Array:
        """Attends to the collection PAST too, and stores the new keys and values in PRESENT."""
        assert places.past_ids_T is not None
        present = {"key": key_BSHK.swapaxes(1, 2), "value": value_BSHK.swapaxes(1, 2)}
        for name, new_BHSK in present.items():
            self.put_variable(PRESENT, name, new_BHSK)
        past = {name: new_BHSK[0, :, :0] for name, new_BHSK in present.items()}
        if places.past_ids_T.size:
            past = {name: self.get_variable(PAST, name) for name in present}
        return attend_to_past(
            query_BSHK,
            *present.values(),
            *past.values(),
            past_ids_T=places.past_ids_T,
            backend=self.spec.attention,
            ranks_CS=places.ranks_BS,
        )


class SwiGLU(nn.Module):
    """Gated feed-forward: down(silu(gate(x)) * up(x))."""

    spec: LayerSpec

    @nn.compact
    def __call__(self, x_BSW: Array) -> Array:
        spec = self.spec
        gate_BSM = spec.linear(spec.mlp_width, axes=("embed", "mlp"), name="gate")(x_BSW)
        up_BSM = spec.linear(spec.mlp_width, axes=("embed", "mlp"), name="up")(x_BSW)
        hidden_BSM = nn.silu(gate_BSM) * up_BSM
        hidden_BSM = nn.with_logical_constraint(hidden_BSM, ("batch", "sequence", "mlp"))
        return spec.linear(spec.width, axes=("mlp", "embed"), name="down", scale=SMALL_INIT)(
            hidden_BSM
        )


def _mlp_in_chunks(mlp: SwiGLU, x_BSW: Array) -> Array:
    """Returns `mlp(x_BSW)`, computed for a chunk of each device's tokens at a time.

    The hidden units of all tokens are thus never in memory at once; the backward pass recomputes
    those of a chunk.
    """
    batch, tokens, width = x_BSW.shape
    shards = logical_axis_shards("sequence")
    local, most = tokens // shards, mlp.spec.mlp_chunk_tokens
    if not most or local <= most or tokens % shards:
        return mlp(x_BSW)
    chunk = max(size for size in range(1, most + 1) if local % size == 0)
    # The loop runs over an axis that is not sharded; the sharded axis stays as it is.
    chunks = x_BSW.reshape(batch, shards, local // chunk, chunk, width)
    axes = ("batch", "sequence", None, None)

    @partial(nn.remat, policy=jax.checkpoint_policies.nothing_saveable, prevent_cse=False)
    def one_chunk(mlp: SwiGLU, carry: None, x: Array) -> tuple[None, Array]:
        return carry, nn.with_logical_constraint(mlp(x), axes)

    scan = nn.scan(
        one_chunk,
        variable_broadcast="params",
        split_rngs={"params": False},
        in_axes=2,
        out_axes=2,
    )
    _, chunks = scan(mlp, None, chunks)
    return chunks.reshape(x_BSW.shape)


class Layer(nn.Module):
    """One pre-norm layer; returns (activations, None), as nn.scan expects."""

    spec: LayerSpec

    @nn.compact
    def __call__(self, x_BSW: Array, places: SequenceLayout) -> tuple[Array, None]:
        x_BSW = nn.with_logical_constraint(x_BSW, ("batch", "sequence", None))
        x_BSW = checkpoint_name(x_BSW, LAYER_INPUT)
        normed_BSW = self.spec.norm("attention_norm")(x_BSW)
        x_BSW += SelfAttention(self.spec, name="attention")(normed_BSW, places)
        normed_BSW = self.spec.norm("mlp_norm")(x_BSW)
        return x_BSW + _mlp_in_chunks(SwiGLU(self.spec, name="mlp"), normed_BSW), None


def transformer_layers(count: int, spec: LayerSpec) -> Callable[[Array, SequenceLayout], Array]:
    """Returns `count` layers, stacked if `spec` says so; to be called in a compact method."""
    if spec.scan_layers:
        scan = scanned_transformer_layers(count, spec)
        return lambda x_BSW, places: scan(x_BSW, places)[0]
    layer = _rematerialised(spec, prevent_cse=True)
    layers = [layer(spec, name=f"{UNSTACKED}{index}") for index in range(count)]

    def in_turn(x_BSW: Array, places: SequenceLayout) -> Array:
        for layer in layers:
            x_BSW, _ = layer(x_BSW, places)
        return x_BSW

    return in_turn


def scanned_transformer_layers(
    count: int, spec: LayerSpec
) -> Callable[[Array, SequenceLayout], tuple]:
    """Returns `count` layers as one scan named "layers"; compile time does not grow with depth."""
    return nn.scan(
        _rematerialised(spec, prevent_cse=False),  # a scan prevents it by itself
        variable_axes={"params": 0, PAST: 0, PRESENT: 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=count,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )(spec, name=STACKED)


def _rematerialised(spec: LayerSpec, *, prevent_cse: bool) -> Any:
    """Returns the Layer class, wrapped as `spec.remat` says."""
    policy = REMAT_POLICIES[spec.remat]
    return Layer if policy is None else nn.remat(Layer, policy=policy, prevent_cse=prevent_cse)
