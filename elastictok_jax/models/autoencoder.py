"""The training task of every family that encodes blocks of inputs to tokens and decodes them.

A family gives its codec and a network; masks, loss terms, evaluation and pictures are here.

Dimension key: B rows, N blocks of a row, P inputs and D values an input of a block, L tokens of a
block, S = N P, T = N L.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import struct

from elastictok_jax import masking
from elastictok_jax.config.schema import (
    NOT_NEGATIVE,
    POSITIVE,
    POSITIVE_FRACTION,
    Key,
    Section,
    one_of,
)
from elastictok_jax.data.batch_sharding import BatchPart
from elastictok_jax.data.pipeline import BatchReader
from elastictok_jax.data.sources.splits import SourceSplits
from elastictok_jax.errors import UsageError
from elastictok_jax.layers.codebook import codebook_counts, codebook_use
from elastictok_jax.layers.patching import patches_per_block
from elastictok_jax.losses.base import Reconstruction, Term, Weight, weighted_sum
from elastictok_jax.losses.perceptual import PerceptualLoss
from elastictok_jax.losses.reconstruction import KL, SquaredError, squared_error_sum
from elastictok_jax.models.base import Batch, Codec, Geometry, Metrics, StepKeys
from elastictok_jax.models.rate_points import (
    evaluated_fractions,
    rate_point_metric_directions,
    rate_point_mse_name,
    tokens_at_targets,
)
from elastictok_jax.perceptual.lpips import lpips_network_shapes
from elastictok_jax.perceptual.lpips_weights import load_lpips
from elastictok_jax.pixels import pixels_to_float, pixels_to_uint8

Array = jax.Array
PICTURE_ROWS = 8  # of a batch

MASKING: Section = {
    "kind": Key("uniform", "distribution of the tokens kept", one_of(*masking.MASKINGS)),
    "min_tokens": Key(256, "fewest tokens that a block keeps", POSITIVE),
    "fraction": Key(0.5, "fixed: fraction of a block's tokens", POSITIVE_FRACTION),
    "mean": Key(0.5, "truncated_normal: fraction of a block's tokens", NOT_NEGATIVE),
    "deviation": Key(0.25, "truncated_normal: fraction of a block's tokens", POSITIVE),
}
LOSS: Section = {
    "lpips_weight": Key(0.1, "weight of LPIPS; 0: none, and its net is not read", NOT_NEGATIVE),
    "lpips_ramp_steps": Key(0, "steps over which that weight grows from 0", NOT_NEGATIVE),
    "lpips_net": Key("vgg", "network of LPIPS", one_of("alex", "vgg")),
    "lpips_every_blocks": Key(1, "LPIPS looks at one frame of this many blocks", POSITIVE),
    "kl_weight": Key(1e-8, "weight of the KL, of codes that have one", NOT_NEGATIVE),
}


@struct.dataclass
class Autoencoded:
    """What a network makes of rows of blocks.

    Attributes:
      decoded: float32 [B, S, D] in [-1, 1].
      codes: [B, T, ...] of every token, kept or not.
      kl_BT: float32 [B, T], or None.
    """

    decoded: Array
    codes: Array
    kl_BT: Array | None = None


class Network(Protocol):
    """The trainable part of an autoencoder."""

    @property
    def has_kl(self) -> bool:
        """Whether codes have a KL, which is then a term of the loss."""
        ...

    def init(self, key: Array) -> Any:
        """Returns the parameters, boxed with their logical axes."""
        ...

    def __call__(
        self, params, inputs: Array, keep: Array, segments: Array, noise_keys: Array | None
    ) -> Autoencoded:
        """Autoencodes rows of packed clips.

        Args:
          inputs: float32 [B, S, D] in [-1, 1].
          keep: bool [B, T], the tokens that are kept.
          segments: int32 [B, S], the clip of each input, 0 for padding.
          noise_keys: [B], for networks that sample; None in evaluation.
        """
        ...

    def train_flops_per_row(self) -> float:
        """Returns the operations of a training step per row, recomputation excluded."""
        ...

    def check_mesh(self, sizes: Mapping[str, int], axis_names: Mapping[str, str]) -> None:
        """Raises UsageError if mesh axes do not divide the model; see `base.Task`."""
        ...


def autoencoder_block_tokens(config: ml_collections.ConfigDict, patch: tuple[int, int, int]) -> int:
    """Returns the patches of a block, and checks that `config.masking` fits them as tokens.

    Raises:
      UsageError: if patches do not divide a block, or masking keeps more tokens than there are.
    """
    video, fewest = config.video, config.masking.min_tokens
    try:
        per_block = patches_per_block(
            video.frames_per_block, video.resolution, video.resolution, patch=patch
        )
    except ValueError as error:
        raise UsageError(
            f"{error}: choose video.resolution and video.frames_per_block as multiples "
            f"of model.patch = {patch}"
        ) from None
    if fewest > per_block:
        raise UsageError(
            f"masking.min_tokens = {fewest} is more than the {per_block} tokens of a block: "
            "lower it"
        )
    if config.masking.kind == "powers_of_two" and not len(
        masking.powers_of_two_lengths(fewest, per_block)
    ):
        raise UsageError(
            f"masking.kind = powers_of_two: no power of two in [{fewest}, {per_block}]: "
            "lower masking.min_tokens"
        )
    return per_block


def autoencoder_geometry(
    config: ml_collections.ConfigDict, patch: tuple[int, int, int]
) -> Geometry:
    """Returns the geometry of blocks whose patches are both inputs and tokens."""
    video, masks, tokens = config.video, config.masking, autoencoder_block_tokens(config, patch)
    return Geometry(
        frames=video.frames_per_block,
        side=video.resolution,
        inputs=tokens,
        input_values=3 * int(np.prod(patch)),
        tokens=tokens,
        min_tokens=min(masks.min_tokens, tokens),
        window=config.data.sequence_blocks,
        fixed_tokens=max(1, round(masks.fraction * tokens)) if masks.kind == "fixed" else None,
    )


@dataclasses.dataclass(frozen=True)
class AutoencoderTask:
    """A `base.Task`: one parameter group, and points that are fractions of the tokens kept."""

    config: ml_collections.FrozenConfigDict
    codec: Codec
    network: Network

    groups = ("model",)

    @property
    def points(self) -> tuple[float, ...]:
        return evaluated_fractions(self.config)

    @property
    def better(self) -> Mapping[str, str]:
        return rate_point_metric_directions(self.points, self.config.evaluation.targets)

    def init(self, key: Array) -> dict[str, Any]:
        return {"model": self.network.init(key)}

    def optimizer(self, group: str) -> ml_collections.ConfigDict:
        del group
        return self.config.optimizer

    def frozen_shapes(self) -> Any:
        loss = self.config.loss
        if not loss.lpips_weight:
            return {}
        return jax.tree.map(
            lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
            lpips_network_shapes(loss.lpips_net),
            is_leaf=lambda shape: isinstance(shape, tuple),
        )

    def frozen(self) -> Any:
        loss = self.config.loss
        return load_lpips(loss.lpips_net) if loss.lpips_weight else {}

    def batch_spec(self, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
        geometry = self.codec.geometry
        shape = (rows, geometry.row_inputs)
        return {
            "patches": jax.ShapeDtypeStruct((*shape, geometry.input_values), jnp.uint8),
            "segment_ids": jax.ShapeDtypeStruct(shape, jnp.int32),
        }

    def reader(
        self, splits: SourceSplits, *, split: str, part: BatchPart | None = None
    ) -> BatchReader:
        return BatchReader(self.config, splits, codec=self.codec, split=split, part=part)

    def totals(self, batch: Batch) -> Metrics:
        valid_BS = batch["segment_ids"] != 0
        valid_BN = valid_BS[:, :: self.codec.geometry.inputs]
        return {
            "tokens": jnp.maximum(jnp.sum(valid_BS), 1).astype(jnp.float32),
            "blocks": jnp.maximum(jnp.sum(valid_BN), 1).astype(jnp.float32),
        }

    @functools.cached_property
    def terms(self) -> tuple[Term, ...]:
        """The terms of the loss, those of weight 0 left out."""
        loss, geometry = self.config.loss, self.codec.geometry
        terms: list[Term] = [SquaredError()]
        if loss.lpips_weight:
            terms.append(
                PerceptualLoss(
                    weight=self._ramped(loss.lpips_weight, loss.lpips_ramp_steps),
                    net=loss.lpips_net,
                    every_blocks=loss.lpips_every_blocks,
                    block_inputs=geometry.inputs,
                    block_frames=geometry.frames,
                    unpack=self.codec.unpack,
                )
            )
        if self.network.has_kl:
            terms.append(KL(loss.kl_weight))
        return tuple(terms)

    @staticmethod
    def _ramped(weight: float, steps: int) -> Weight:
        return optax.linear_schedule(0.0, weight, steps) if steps else weight

    def keep_lengths(self, rows_B: Array, keys: StepKeys) -> Array:
        geometry = self.codec.geometry
        return masking.draw_lengths(
            keys("mask"),
            rows_B[:, None] * geometry.window + jnp.arange(geometry.window),
            max_tokens=geometry.tokens,
            **self.config.masking.to_dict(),
        )

    def loss(
        self,
        group: str,
        params: Mapping[str, Any],
        batch: Batch,
        rows_B: Array,
        *,
        frozen: Any,
        keys: StepKeys,
        totals: Metrics,
    ) -> tuple[Array, Metrics]:
        geometry, segments_BS = self.codec.geometry, batch["segment_ids"]
        keep_BT = masking.keep_mask(
            self.keep_lengths(rows_B, keys), tokens_per_block=geometry.tokens
        )
        target_BSD = pixels_to_float(batch["patches"])
        noise_keys_B = jax.vmap(functools.partial(jax.random.fold_in, keys("noise")))(rows_B)
        output = self.network(params[group], target_BSD, keep_BT, segments_BS, noise_keys_B)
        made = Reconstruction(
            decoded_BSD=output.decoded,
            target_BSD=target_BSD,
            segments_BS=segments_BS,
            kept_BT=keep_BT & self._valid_tokens(segments_BS),
            kl_BT=output.kl_BT,
            rows_B=rows_B,
        )
        total, metrics = weighted_sum(self.terms, made, frozen=frozen, keys=keys, totals=totals)
        metrics["kept_fraction"] = jnp.sum(made.kept_BT) / totals["tokens"]
        return total, metrics

    def evaluate(
        self, params: Mapping[str, Any], frozen: Any, batch: Batch, point: Array
    ) -> tuple[Metrics, Array]:
        """Keeps round(point * L) tokens of every block.

        Sums over valid inputs: "error" (clipped to [-1, 1] first, as the tokenizer reports it) and
        "tokens"; "codebook_counts" of the kept tokens where codes are numbered; "block_error"
        [B, N], the MSE of each block. The array to draw is float [B, S, D] in [-1, 1].
        """
        del frozen
        geometry, segments_BS = self.codec.geometry, batch["segment_ids"]
        valid_BS = segments_BS != 0
        lengths = jnp.maximum(1, jnp.round(point * geometry.tokens)).astype(jnp.int32)
        lengths_BN = jnp.full((segments_BS.shape[0], geometry.window), lengths)
        keep_BT = masking.keep_mask(lengths_BN, tokens_per_block=geometry.tokens)
        target_BSD = pixels_to_float(batch["patches"])
        output = self.network(params[self.groups[0]], target_BSD, keep_BT, segments_BS, None)
        decoded_BSD = jnp.clip(output.decoded, -1.0, 1.0)
        error_BS = jnp.mean((decoded_BSD - target_BSD) ** 2, axis=-1)
        error_BNP = error_BS.reshape(*lengths_BN.shape, geometry.inputs)
        valid_BN = valid_BS[:, :: geometry.inputs]
        sums = {
            "error": squared_error_sum(decoded_BSD, target_BSD, valid_BS),
            "tokens": jnp.sum(valid_BS).astype(jnp.float32),
            "block_error": jnp.where(valid_BN, jnp.mean(error_BNP, axis=-1), jnp.nan),
        }
        code = self.codec.code
        if code.size:
            kept_BT = keep_BT & self._valid_tokens(segments_BS)
            sums["codebook_counts"] = codebook_counts(
                output.codes, kept_BT, codebook_size=code.size
            )
        return sums, decoded_BSD

    def summarise(self, sums: Sequence[Mapping[str, np.ndarray]]) -> dict[str, float]:
        """Returns the MSE at each point, use of the codebook at the first, `tokens_at_targets`."""
        results: dict[str, float] = {}
        for point, total in zip(self.points, sums, strict=True):
            results[rate_point_mse_name(point, self.points)] = float(
                total["error"] / total["tokens"]
            )
            if point == self.points[0] and "codebook_counts" in total:
                statistics = codebook_use(total["codebook_counts"])
                results |= {f"codebook_{name}": value for name, value in statistics.items()}
        tokens_K = np.maximum(1, np.round(np.asarray(self.points) * self.codec.geometry.tokens))
        errors_KN = np.stack([total["block_error"] for total in sums])
        return results | tokens_at_targets(errors_KN, tokens_K, self.config.evaluation.targets)

    def picture(self, values: Array) -> Array:
        """Returns the first frame of the first rows, one below the other, uint8 [rows R, R, 3]."""
        geometry = self.codec.geometry
        patches_BLD = values[:PICTURE_ROWS, : geometry.inputs]
        if patches_BLD.dtype != jnp.uint8:
            patches_BLD = pixels_to_uint8(patches_BLD)
        return self.codec.unpack(patches_BLD)[:, 0].reshape(-1, geometry.side, 3)

    def flops_per_row(self) -> float:
        return self.network.train_flops_per_row()

    def check_mesh(self, sizes: Mapping[str, int], axis_names: Mapping[str, str]) -> None:
        self.network.check_mesh(sizes, axis_names)

    def _valid_tokens(self, segments_BS: Array) -> Array:
        """Returns bool [B, T]: tokens of blocks that are not padding."""
        geometry = self.codec.geometry
        if geometry.inputs == geometry.tokens:
            return segments_BS != 0
        return jnp.repeat(segments_BS[:, :: geometry.inputs] != 0, geometry.tokens, axis=1)
