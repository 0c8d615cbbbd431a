"""Declares config keys: one line a key with its default, its constraint and what it means.

A section is a dict of keys. The sections every experiment has are in `defaults.py`; a model family
adds its own (`SECTIONS` of its module). Validation, `elastictok config` and the tables in
docs/config.md are made from the same lines.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from elastictok_jax.errors import UsageError


class Constraint(NamedTuple):
    """What a value must be.

    Attributes:
      words: completes "must be ..."; allows: whether a value is allowed.
    """

    words: str
    allows: Callable[[Any], bool]


class Key(NamedTuple):
    """A config key.

    Attributes:
      default: its value and type.
      doc: what it means, in a few words.
      constraint: what its value must be, or None.
    """

    default: Any
    doc: str
    constraint: Constraint | None = None


Section = Mapping[str, Key]

POSITIVE = Constraint("greater than 0", lambda x: x > 0)
NOT_NEGATIVE = Constraint("0 or more", lambda x: x >= 0)
FRACTION = Constraint("in [0, 1]", lambda x: 0 <= x <= 1)
POSITIVE_FRACTION = Constraint("in (0, 1]", lambda x: 0 < x <= 1)
BELOW_ONE = Constraint("in [0, 1)", lambda x: 0 <= x < 1)


class OneOf(Constraint):
    """A choice of several values."""


def one_of(*choices: Any) -> Constraint:
    """Returns the constraint to be one of `choices`."""
    return OneOf(", ".join(map(str, choices)), lambda x: x in choices)


def check_constraint(key: str, value: Any, constraint: Constraint | None) -> None:
    """Raises UsageError, naming the key, if its value is not allowed."""
    if constraint is None or constraint.allows(value):
        return
    if isinstance(constraint, OneOf):
        raise UsageError(f"{key} = {value!r}: choose one of {constraint.words}")
    raise UsageError(f"{key} = {value!r}: must be {constraint.words}")


def schema_defaults(section: Section) -> dict[str, Any]:
    """Returns the default of each key."""
    return {name: key.default for name, key in section.items()}
