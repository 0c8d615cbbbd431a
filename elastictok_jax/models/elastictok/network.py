"""ElasticTok's network: which parameters it has, what it costs, and which meshes fit it.

Dimension key: B rows, S tokens of a row (a patch each), D patch values.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from elastictok_jax.models.autoencoder import Autoencoded
from elastictok_jax.models.elastictok.codec import ElasticTokCodec, count_matrix_weights
from elastictok_jax.models.elastictok.model import init_elastictok_model
from elastictok_jax.parallel.mesh import Divided, require_mesh_axis_divides

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class ElasticTokNetwork:
    """See `models.autoencoder.Network`."""

    codec: ElasticTokCodec

    @property
    def has_kl(self) -> bool:
        return self.codec.model.bottleneck.has_kl

    def init(self, key: Array) -> Any:
        return init_elastictok_model(self.codec.model, key)

    def __call__(
        self, params, inputs: Array, keep: Array, segments: Array, noise_keys: Array | None
    ) -> Autoencoded:
        output: Any = self.codec.model.apply(
            {"params": params}, inputs, keep, self.codec.row_layout(segments), noise_keys
        )
        return Autoencoded(output.reconstruction, output.codes, output.kl_BS)

    def train_flops_per_row(self) -> float:
        """Counts 6 for each weight of a matrix (2 forward, 4 backward), and 12 x width a visible
        key a layer for scores and mixing; a token sees (N + 1) / 2 of N blocks on average."""
        geometry, model = self.codec.geometry, self.codec.config.model
        weights = count_matrix_weights(self.codec.params_shapes())
        layers = model.encoder_layers + model.decoder_layers
        visible_keys = geometry.tokens * (geometry.window + 1) / 2
        per_token = 6.0 * weights + 12.0 * layers * model.width * visible_keys
        return geometry.row_inputs * per_token

    def check_mesh(self, sizes: Mapping[str, int], axis_names: Mapping[str, str]) -> None:
        geometry, model = self.codec.geometry, self.codec.config.model
        tensor, sequence = sizes["tensor"], sizes["sequence"]
        width_step = math.lcm(sizes["fsdp"], 2 * model.heads)
        divided: tuple[tuple[str, int, int, str, Callable[[int], bool]], ...] = (
            ("model.width", model.width, 1, "fsdp", lambda width: width % width_step == 0),
            (
                *("model.heads", model.heads, 1, "tensor"),
                lambda heads: heads % tensor == 0 and model.width % (2 * heads) == 0,
            ),
            ("model.mlp_width", model.mlp_width, 1, "tensor", lambda width: width % tensor == 0),
            (
                *("data.sequence_blocks", geometry.window, geometry.inputs, "sequence"),
                lambda blocks: blocks * geometry.inputs % sequence == 0,
            ),
        )
        for setting in divided:
            require_mesh_axis_divides(Divided(*setting), sizes=sizes, axis_names=axis_names)
