"""Attention on a mesh: each device runs a kernel on its shard of batch, heads and sequence.

Dimension key: B batch, S tokens, H heads, K head width.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec

from elastictok_jax.errors import UsageError
from elastictok_jax.layers.attention.kernel import FILLING, Array, Kernel, Visibility
from elastictok_jax.layers.attention.ring import RingKernel
from elastictok_jax.layers.attention.tile import pad_to_multiple
from elastictok_jax.parallel.sharding import logical_axis_shards


@dataclasses.dataclass(frozen=True)
class ShardedKernel:
    """`kernel` on every device of the current mesh, to be called outside a shard_map.

    Attributes:
      spec: sharding of [B, H, S, K] on the mesh.
      sequence_shards: shards of a sequence, which is padded to a multiple of it.
    """

    kernel: Kernel
    spec: PartitionSpec
    sequence_shards: int

    def forward(self, query_BHSK, key_BHSK, value_BHSK, visibility):
        """As `Kernel.forward`, for self-attention of one sequence."""
        inputs = (query_BHSK, key_BHSK, value_BHSK)
        outputs = (self.spec, PartitionSpec(*self.spec[:3]))
        return self._call(self.kernel.forward, inputs, visibility, {}, outputs)

    def backward(
        self, query_BHSK, key_BHSK, value_BHSK, visibility, *, out_BHSK, lse_BHS, grad_BHSK
    ):
        """As `Kernel.backward`, for self-attention of one sequence."""
        inputs = (query_BHSK, key_BHSK, value_BHSK)
        more = dict(out_BHSK=out_BHSK, lse_BHS=lse_BHS, grad_BHSK=grad_BHSK)
        return self._call(self.kernel.backward, inputs, visibility, more, (self.spec,) * 3)

    def _call(self, method, inputs, visibility: Visibility, more: dict[str, Array], outputs):
        tokens, per_block = inputs[0].shape[2], visibility.tokens_per_block
        ranks_BS = visibility.query_ranks_BS
        if ranks_BS is not None and self.sequence_shards > 1:
            raise UsageError(
                "attention by ranks of tokens cannot be sharded over mesh.sequence: ring "
                "attention supports only uniform blocks. Set mesh.sequence=1 and use other axes"
            )
        arrays = [*inputs, *more.values()]
        specs = [PartitionSpec(*self.spec[: x.ndim]) for x in arrays]
        arrays = [pad_to_multiple(x, axis=2, multiple=self.sequence_shards) for x in arrays]
        ids_BS = visibility.query_ids_BS
        ids_BS = pad_to_multiple(ids_BS, axis=1, multiple=self.sequence_shards, value=FILLING)

        def on_device(ids_BS, ranks_BS, *arrays):
            ranks = dict(query_ranks_BS=ranks_BS, key_ranks_BT=ranks_BS)
            seen = Visibility(ids_BS, ids_BS, per_block, **ranks)
            named = dict(zip(more, arrays[3:], strict=True))
            return method(*arrays[:3], seen, **named)

        ids_spec = PartitionSpec(self.spec[0], self.spec[2])
        results = jax.shard_map(
            on_device,
            in_specs=(ids_spec, ids_spec, *specs),
            out_specs=outputs,
            check_vma=False,  # it does not support conds that differ between devices
        )(ids_BS, ranks_BS, *arrays)
        return tuple(x[:, :, :tokens] for x in results)


def shard_kernel(kernel: Kernel, shape_BHSK: tuple[int, ...]) -> ShardedKernel:
    """Wraps `kernel` for arrays of this shape on the current mesh, by the logical axis rules.

    Batch and heads are replicated if the mesh does not divide them.
    """
    axes: list[Any] = list(nn.logical_to_mesh_axes(("batch", "heads", "sequence", None)) or ())

    for dimension, name in enumerate(("batch", "heads")):
        if shape_BHSK[dimension] % logical_axis_shards(name):
            axes[dimension] = None
    sequence_shards = logical_axis_shards("sequence")
    if sequence_shards > 1:
        kernel = RingKernel(kernel, axes[2], sequence_shards)
    return ShardedKernel(kernel, PartitionSpec(*axes), sequence_shards)
