"""Which meshes fit an ElasticTok: axes divide its width, heads, feed-forward width and sequence."""

import math
from collections.abc import Callable, Mapping

import ml_collections

from elastictok_jax.models.base import Geometry
from elastictok_jax.parallel.mesh import Divided, require_divided


def check_mesh(
    config: ml_collections.FrozenConfigDict,
    geometry: Geometry,
    sizes: Mapping[str, int],
    axis_names: Mapping[str, str],
) -> None:
    """Raises UsageError, with the nearest settings that fit, if the mesh does not divide a model.

    Args:
      sizes, axis_names: as in `models.base.Task.check_mesh`.
    """
    model, tensor, sequence = config.model, sizes["tensor"], sizes["sequence"]
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
        require_divided(Divided(*setting), sizes=sizes, axis_names=axis_names)
