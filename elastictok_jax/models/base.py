"""The two protocols that a model family implements, and what they are made of.

A family is a module with a `family(config)` that returns a `Family`: a `Task`, which is all that
the trainer knows of it, and a `Codec`, which is all that tokenizer, evaluation, compilation and
export know of it. Both are frozen and hashable. `docs/add_a_model.md` walks through a small one.

Dimension key: B rows, N blocks of a row, F frames, R side, P inputs and D values an input of a
block, L tokens of a block, S = N x P inputs of a row, C candidates for one block.
"""

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import ml_collections
import numpy as np

from elastictok_jax.layers.codes import Code

Array = jax.Array
Batch = dict[str, Array]
Metrics = dict[str, Array]

# Streams that were once numbered; their keys stay what they were, so runs do not change.
_NUMBERED = ("mask", "noise", "frames")


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Sizes of what goes into a block and what comes out.

    Attributes:
      frames: F, frames of a block.
      side: R, height and width of a frame in pixels.
      inputs: P, positions that the encoder reads, and input_values: D, uint8 values of each.
      tokens: L, the most tokens of a block.
      min_tokens: the fewest that a search or a budget gives a block, as in training.
      window: blocks of a training row, which may see each other.
      fixed_tokens: the tokens of every block of a model that was trained for one number; None for
        an elastic one.
    """

    frames: int
    side: int
    inputs: int
    input_values: int
    tokens: int
    min_tokens: int
    window: int
    fixed_tokens: int | None = None

    @property
    def row_inputs(self) -> int:
        """S, inputs of a training row."""
        return self.window * self.inputs


@dataclasses.dataclass(frozen=True)
class StepKeys:
    """Random keys of a training step by name, a function of (seed, step, name).

    Fold the global row or block index into a key, so that no mesh or microbatch changes it.
    """

    seed: int
    step: Array | int

    def __call__(self, name: str) -> Array:
        key = jax.random.fold_in(jax.random.key(self.seed), self.step)
        if name in _NUMBERED:
            return jax.random.split(key, len(_NUMBERED))[_NUMBERED.index(name)]
        return jax.random.fold_in(key, zlib.crc32(name.encode()))


class Task(Protocol):
    """What is trained: parameters, loss and evaluation of a model family.

    Attributes:
      groups: names of the parameter groups, the first one the group to export. The loss of each is
        differentiated by the parameters of that group, and each has an optimizer of its own.
      points: operating points that are evaluated, the first one without a suffix in metrics.
      better: whether the "lower" or the "higher" value of each metric of `summarise` is better.
    """

    @property
    def groups(self) -> tuple[str, ...]: ...

    @property
    def points(self) -> tuple[float, ...]: ...

    @property
    def better(self) -> Mapping[str, str]: ...

    def init(self, key: Array) -> dict[str, Any]:
        """Returns the parameters of each group, boxed with their logical axes."""
        ...

    def optimizer(self, group: str) -> ml_collections.ConfigDict:
        """Returns the optimizer settings of a group, with the keys of `config.optimizer`."""
        ...

    def frozen_shapes(self) -> Any:
        """Returns a tree of ShapeDtypeStructs of what `frozen` returns, without reading it."""
        ...

    def frozen(self) -> Any:
        """Returns read-only arrays that the loss needs, such as LPIPS weights; {} for none."""
        ...

    def batch_spec(self, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the global shapes of a batch; axes are rows, then positions of a row."""
        ...

    def reader(self, splits, *, split: str, part=None):
        """Returns a `data.pipeline.BatchReader`: batches are functions of (seed, index)."""
        ...

    def keep_lengths(self, rows_B: Array, keys: StepKeys) -> Array | None:
        """Returns int32 [B, N], the tokens that a step keeps of each block; None for all."""
        ...

    def totals(self, batch: Batch) -> Metrics:
        """Returns the counts that the terms of the loss are means over, of a complete batch."""
        ...

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
        """Returns the loss of a group and its terms, for some rows of a batch.

        Terms are sums over these rows, divided by the totals of the complete batch, so that the
        losses and gradients of microbatches add up to those of the batch.

        Args:
          params: of all groups.
          rows_B: int32, the rows' places in the global batch.
          totals: of the complete batch.
        """
        ...

    def evaluate(
        self, params: Mapping[str, Any], frozen: Any, batch: Batch, point: Array
    ) -> tuple[Metrics, Array]:
        """Returns sums over a batch, or [B, N] values a block (nan for padding), and an array with
        the axes of a batch that `picture` can draw."""
        ...

    def summarise(self, sums: Sequence[Mapping[str, np.ndarray]]) -> dict[str, float]:
        """Returns the metrics of an evaluation from what `evaluate` returned at each of `points`,
        sums added up and [B, N] values joined over batches."""
        ...

    def picture(self, values: Array) -> Array:
        """Returns uint8 [H, W, 3] of inputs of a batch, or of what `evaluate` returned."""
        ...

    def flops_per_row(self) -> float:
        """Returns the model's operations of a training step per row, recomputation excluded."""
        ...

    def check_mesh(self, sizes: Mapping[str, int], axis_names: Mapping[str, str]) -> None:
        """Raises UsageError, with the nearest settings that fit, if mesh axes do not divide the
        model.

        Args:
          sizes: of the mesh axes.
          axis_names: what the config keys that make up each axis are called.
        """
        ...


class Codec(Protocol):
    """What codes clips: blocks of frames to tokens and back, left to right.

    A clip is coded a block at a time. What a block may know of earlier ones is in `past`, a tree of
    arrays that only the codec looks into: {} where blocks have no context. Encoding and decoding
    with equal arguments give equal bits, and `decode` sees of codes only those that `keep` says.

    Attributes:
      geometry: sizes of a block.
      code: what a token is.
      knows_length: whether codes depend on how many tokens are kept.
    """

    @property
    def geometry(self) -> Geometry: ...

    @property
    def code(self) -> Code: ...

    @property
    def knows_length(self) -> bool: ...

    def params_shapes(self) -> Any:
        """Returns the parameters' tree of ShapeDtypeStructs, those of the task's first group."""
        ...

    def pack(self, frames: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Returns the inputs uint8 [..., P, D] of blocks of frames uint8 [..., F, R, R, 3]."""
        ...

    def unpack(self, inputs):
        """Returns the frames [..., F, R, R, 3] of inputs [..., P, D], the reverse of `pack`."""
        ...

    def start(self, *, window: int) -> tuple[Any, Any]:
        """Returns the pasts of encoder and decoder before a clip's first block, where `window`
        blocks see each other, the newest one included."""
        ...

    def extend(self, past: Any, present: Any) -> Any:
        """Returns the past of the next block; `past` must not be used again."""
        ...

    def encode(self, params, inputs: Array, keep: np.ndarray, past: Any) -> tuple[Array, Any]:
        """Returns the codes [C, L, ...] of one block and what `extend` takes of one candidate.

        Args:
          inputs: uint8 [P, D].
          keep: bool [C, L], the tokens that each candidate keeps.
        """
        ...

    def decode(
        self, params, codes: Array, keep: np.ndarray, past: Any, key: Array
    ) -> tuple[Array, Any]:
        """Returns frames uint8 [C, F, R, R, 3] of codes, and what `extend` takes of one candidate.

        Args:
          key: for decoders that sample, a function of the model and the block's index.
        """
        ...

    def encode_rows(self, params, inputs: Array, keep: Array, segments: Array) -> Array:
        """Returns the codes [B, N L, ...] of whole rows of packed clips, to be jitted on a mesh.

        Args:
          inputs: uint8 [B, N P, D].
          keep: bool [B, N L].
          segments: int32 [B, N P], the clip of each input, 0 for padding.
        """
        ...

    def decode_rows(self, params, codes: Array, keep: Array, segments: Array) -> Array:
        """Returns what `encode_rows` takes as inputs, uint8 [B, N P, D], of codes."""
        ...

    def flops_per_row(self, half: str) -> float:
        """Returns the operations of the "encode" or "decode" half per training row."""
        ...


class Family(NamedTuple):
    """A model as the rest of the framework sees it."""

    task: Task
    codec: Codec
