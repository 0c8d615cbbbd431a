"""Finds model families by the name in the config key `model.family`.

A family is a module with `family(config) -> models.base.Family` and `SECTIONS`, its sections of the
config. Families of this package are modules in `elastictok_jax.models`; those of other packages are
named by entry points of the group `elastictok_jax.families`, or registered by a program itself.
"""

import importlib
import importlib.metadata
import importlib.util
from types import ModuleType
from typing import Any

import ml_collections

from elastictok_jax.errors import UsageError
from elastictok_jax.models.base import Family

ENTRY_POINTS = "elastictok_jax.families"
DEFAULT_FAMILY = "elastictok"  # of configs that were written before they named one
BUILT_IN = (DEFAULT_FAMILY,)
_registered: dict[str, ModuleType] = {}


def register_family(name: str, module: ModuleType) -> None:
    """Registers a family of this program under `name`, replacing one of the same name."""
    _registered[name] = module


def _family_names() -> list[str]:
    """Returns the names of all families that can be found."""
    installed = (point.name for point in importlib.metadata.entry_points(group=ENTRY_POINTS))
    return sorted({*BUILT_IN, *_registered, *installed})


def family_module(name: str) -> Any:
    """Imports the module of a family.

    Raises:
      UsageError: if there is no such family, or its package cannot be imported.
    """
    if name in _registered:
        return _registered[name]
    if name in BUILT_IN:
        return importlib.import_module(f"elastictok_jax.models.{name}")
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS, name=name):
        try:
            return point.load()
        except ImportError as error:
            raise UsageError(
                f"model.family = {name!r}: {point.value} cannot be imported ({error}): install "
                "the package that it is part of"
            ) from error
    raise UsageError(
        f"model.family = {name!r}: choose one of {', '.join(_family_names())}, or install the "
        "package that has it"
    )


def family_of_config(config: ml_collections.ConfigDict) -> Family:
    """Returns the family that a resolved config describes.

    Raises:
      UsageError: if there is no such family.
    """
    name = config.model.family
    return family_module(name).family(ml_collections.FrozenConfigDict(config))
