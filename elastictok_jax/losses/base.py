"""What a loss is made of: weighted terms, each a sum over rows and what it is a mean over.

A new term is one file in this folder with a class like those of `reconstruction.py`; a family lists
the terms of its loss. Sums are divided by the totals of the complete batch, so that the losses and
gradients of microbatches add up to those of the batch (ElasticTok, arXiv 2410.08368, section 3.3).

Dimension key: B rows, N blocks of a row, S inputs of a row, D values of an input.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
from flax import struct

Array = jax.Array
Weight = float | Callable[[Array], Array]  # an optax schedule


@struct.dataclass
class Reconstruction:
    """Rows of packed clips and what a model made of them.

    Attributes:
      decoded_BSD, target_BSD: float32, pixels in [-1, 1].
      segments_BS: int32, the clip of each input, 0 for padding.
      kept_BT: bool, valid tokens that were kept; kl_BT: float32, their KL, or None.
      rows_B: int32, the rows' places in the global batch.
    """

    decoded_BSD: Array
    target_BSD: Array
    segments_BS: Array
    kept_BT: Array
    kl_BT: Array | None
    rows_B: Array


class Term(Protocol):
    """One term of a loss.

    Attributes:
      name: of its metric.
      weight: a number, or an optax schedule of it by step.
      per: which of the task's totals the sum is divided by.
    """

    @property
    def name(self) -> str: ...

    @property
    def weight(self) -> Weight: ...

    @property
    def per(self) -> str: ...

    def __call__(self, made: Any, *, frozen: Any, keys: Callable[[str], Array]) -> Array:
        """Returns the float32 sum over the rows of `made`."""
        ...


def weighted_sum(
    terms: Sequence[Term], made: Any, *, frozen: Any, keys: Any, totals: dict[str, Array]
) -> tuple[Array, dict[str, Array]]:
    """Returns the sum of all terms times their weights, and the unweighted terms by name.

    Args:
      keys: random keys by name, and the `step` that schedules of weights are functions of.
    """
    total: Any = 0.0
    metrics = {}
    for term in terms:
        metrics[term.name] = term(made, frozen=frozen, keys=keys) / totals[term.per]
        weight = term.weight(keys.step) if callable(term.weight) else term.weight
        total += weight * metrics[term.name]
    return total, metrics
