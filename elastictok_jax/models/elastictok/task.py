"""ElasticTok's training task: random tail masking, reconstruction, LPIPS and KL (section 3).

Dimension key: B rows, S tokens of a row (a patch each), D patch values, N blocks, L tokens a block.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from elastictok_jax import masking
from elastictok_jax.data.pipeline import BatchReader, Part
from elastictok_jax.data.sources.splits import SourceSplits
from elastictok_jax.layers.bottlenecks import codebook_counts, codebook_statistics
from elastictok_jax.losses.base import Reconstruction, Term, Weight, weighted_sum
from elastictok_jax.losses.perceptual import PerceptualLoss
from elastictok_jax.losses.reconstruction import KL, SquaredError, squared_error_sum
from elastictok_jax.models.base import Batch, Metrics, StepKeys
from elastictok_jax.models.elastictok.codec import ElasticTokCodec, matrix_weights
from elastictok_jax.models.elastictok.mesh import check_mesh
from elastictok_jax.models.elastictok.model import init_params
from elastictok_jax.models.rate_points import (
    fractions_of,
    metric_directions,
    mse_name,
    thresholds,
)
from elastictok_jax.perceptual.lpips import lpips_shapes
from elastictok_jax.perceptual.lpips_weights import load_lpips
from elastictok_jax.pixels import to_float, to_uint8

Array = jax.Array
PICTURE_ROWS = 8  # of a batch


@dataclasses.dataclass(frozen=True)
class ElasticTokTask:
    """See `models.base.Task`. One parameter group, and points that are fractions of tokens kept."""

    codec: ElasticTokCodec

    groups = ("model",)

    @property
    def config(self) -> ml_collections.FrozenConfigDict:
        return self.codec.config

    @property
    def points(self) -> tuple[float, ...]:
        return fractions_of(self.config)

    @property
    def better(self) -> Mapping[str, str]:
        return metric_directions(self.points, self.config.evaluation.targets)

    def init(self, key: Array) -> dict[str, Any]:
        return {"model": init_params(self.codec.model, key)}

    def optimizer(self, group: str) -> ml_collections.ConfigDict:
        del group
        return self.config.optimizer

    def frozen_shapes(self) -> Any:
        loss = self.config.loss
        if not loss.lpips_weight:
            return {}
        return jax.tree.map(
            lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
            lpips_shapes(loss.lpips_net),
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

    def reader(self, splits: SourceSplits, *, split: str, part: Part | None = None) -> BatchReader:
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
        if self.codec.model.bottleneck.has_kl:
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
        codec, segments_BS = self.codec, batch["segment_ids"]
        lengths_BN = self.keep_lengths(rows_B, keys)
        keep_BS = masking.keep_mask(lengths_BN, tokens_per_block=codec.geometry.tokens)
        target_BSD = to_float(batch["patches"])
        noise_keys_B = jax.vmap(functools.partial(jax.random.fold_in, keys("noise")))(rows_B)
        output: Any = codec.model.apply(
            {"params": params[group]},
            target_BSD,
            keep_BS,
            codec.row_layout(segments_BS),
            noise_keys_B,
        )
        made = Reconstruction(
            decoded_BSD=output.reconstruction,
            target_BSD=target_BSD,
            segments_BS=segments_BS,
            kept_BT=keep_BS & (segments_BS != 0),
            kl_BT=output.kl_BS,
            rows_B=rows_B,
        )
        total, metrics = weighted_sum(self.terms, made, frozen=frozen, keys=keys, totals=totals)
        metrics["kept_fraction"] = jnp.sum(made.kept_BT) / totals["tokens"]
        return total, metrics

    def evaluate(
        self, params: Mapping[str, Any], frozen: Any, batch: Batch, point: Array
    ) -> tuple[Metrics, Array]:
        """Keeps round(point * L) tokens of every block.

        Sums over valid tokens: "error" (clipped to [-1, 1] first, as the tokenizer reports it) and
        "tokens"; "codebook_counts" of the kept tokens where codes are numbered; "block_error"
        [B, N], the MSE of each block. The array to draw is float [B, S, D] in [-1, 1].
        """
        del frozen
        codec, segments_BS = self.codec, batch["segment_ids"]
        per_block, valid_BS = codec.geometry.tokens, segments_BS != 0
        lengths = jnp.maximum(1, jnp.round(point * per_block)).astype(jnp.int32)
        lengths_BN = jnp.full((segments_BS.shape[0], segments_BS.shape[1] // per_block), lengths)
        keep_BS = masking.keep_mask(lengths_BN, tokens_per_block=per_block)
        target_BSD = to_float(batch["patches"])
        output: Any = codec.model.apply(
            {"params": params["model"]}, target_BSD, keep_BS, codec.row_layout(segments_BS)
        )
        decoded_BSD = jnp.clip(output.reconstruction, -1.0, 1.0)
        error_BS = jnp.mean((decoded_BSD - target_BSD) ** 2, axis=-1)
        error_BNL = error_BS.reshape(*lengths_BN.shape, per_block)
        valid_BN = valid_BS[:, ::per_block]
        sums = {
            "error": squared_error_sum(decoded_BSD, target_BSD, valid_BS),
            "tokens": jnp.sum(valid_BS).astype(jnp.float32),
            "block_error": jnp.where(valid_BN, jnp.mean(error_BNL, axis=-1), jnp.nan),
        }
        if codec.code.size:
            sums["codebook_counts"] = codebook_counts(
                output.codes, keep_BS & valid_BS, codebook_size=codec.code.size
            )
        return sums, decoded_BSD

    def summarise(self, sums: Sequence[Mapping[str, np.ndarray]]) -> dict[str, float]:
        """Returns the MSE at each point, use of the codebook at the first, and `thresholds`."""
        results: dict[str, float] = {}
        for point, total in zip(self.points, sums, strict=True):
            results[mse_name(point, self.points)] = float(total["error"] / total["tokens"])
            if point == self.points[0] and "codebook_counts" in total:
                statistics = codebook_statistics(total["codebook_counts"])
                results |= {f"codebook_{name}": value for name, value in statistics.items()}
        tokens_K = np.maximum(1, np.round(np.asarray(self.points) * self.codec.geometry.tokens))
        errors_KN = np.stack([total["block_error"] for total in sums])
        return results | thresholds(errors_KN, tokens_K, self.config.evaluation.targets)

    def picture(self, values: Array) -> Array:
        """Returns the first frame of the first rows, one below the other, uint8 [rows R, R, 3]."""
        geometry = self.codec.geometry
        patches_BLD = values[:PICTURE_ROWS, : geometry.inputs]
        if patches_BLD.dtype != jnp.uint8:
            patches_BLD = to_uint8(patches_BLD)
        return self.codec.unpack(patches_BLD)[:, 0].reshape(-1, geometry.side, 3)

    def flops_per_row(self) -> float:
        """Counts 6 for each weight of a matrix (2 forward, 4 backward), and 12 x width a visible
        key a layer for scores and mixing; a token sees (N + 1) / 2 of N blocks on average."""
        geometry, model = self.codec.geometry, self.config.model
        weights = matrix_weights(self.codec.params_shapes())
        layers = model.encoder_layers + model.decoder_layers
        visible_keys = geometry.tokens * (geometry.window + 1) / 2
        per_token = 6.0 * weights + 12.0 * layers * model.width * visible_keys
        return geometry.row_inputs * per_token

    def check_mesh(self, sizes: Mapping[str, int], axis_names: Mapping[str, str]) -> None:
        check_mesh(self.config, self.codec.geometry, sizes, axis_names)
