"""Overrides, validation and config.json; messages name the key, its value and the fix."""

import difflib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_collections

from elastictok_jax.config.defaults import (
    SOURCE,
    TOP,
    default_config,
    default_sections,
    default_source_config,
)
from elastictok_jax.config.schema import check_constraint
from elastictok_jax.errors import UsageError
from elastictok_jax.models.registry import DEFAULT_FAMILY, family_module

IN_SOURCE = r"data\.sources\.(\w+)\."  # what the keys of one source start with
# Keys of configs that were written before config.compute existed.
MOVED = {
    f"model.{name}": f"compute.{name}"
    for name in ("attention", "remat", "mlp_chunk_tokens", "dtype", "scan_layers")
}


def apply_overrides(config: ml_collections.ConfigDict, overrides: dict[str, Any]) -> None:
    """Sets dotted keys in place, as `--config.KEY=VALUE` does; values take the default's type.

    A key of a source that is not there yet adds that source.

    Raises:
      UsageError: on a key that does not exist, naming the nearest, or a value of another type.
    """
    for key in overrides:
        named = re.match(IN_SOURCE, key)
        if named and named[1] not in config.data.sources:
            config.data.sources[named[1]] = default_source_config()
    known = flatten_config(config)
    for key, value in overrides.items():
        if key not in known:
            raise UsageError(f"unknown config key {key}: {_nearest(key, known)}")
        config.update_from_flattened_dict({key: parse_config_value(key, value, like=known[key])})


def _nearest(key: str, known: Iterable[str]) -> str:
    if key in MOVED:
        return f"it is {MOVED[key]} now"
    near = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {near[0]}?" if near else f"keys are {', '.join(sorted(known))}"


def parse_config_value(key: str, value: Any, *, like: Any) -> Any:
    """`value` (often a string) as the type of `like`."""
    kind = type(like)
    try:
        if isinstance(like, tuple):
            items = value.strip("()[] ").split(",") if isinstance(value, str) else value
            return tuple(_parse_scalar(item, type(like[0])) for item in items if str(item).strip())
        return _parse_scalar(value, kind)
    except (KeyError, TypeError, ValueError):
        raise UsageError(
            f"config key {key}: {value!r} is not {kind.__name__} (now {like!r})"
        ) from None


def _parse_scalar(value: Any, kind: type) -> Any:
    """`value` as a bool, int, float or str; raises KeyError, TypeError or ValueError."""
    if kind is bool:
        return {"true": True, "1": True, "false": False, "0": False}[str(value).lower()]
    if kind is int and isinstance(value, float) and not value.is_integer():
        raise ValueError(value)  # int() would cut it in silence
    return kind(value)


def flatten_config(config: ml_collections.ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Nested config as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            flat |= flatten_config(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _check_sources(config: ml_collections.ConfigDict) -> None:
    """Raises UsageError where a source lacks a path or has a bad setting."""
    sources, side = config.data.sources, config.video.resolution
    for source_name, source in sources.items():
        key = f"data.sources.{source_name}"
        if not source.path:
            raise UsageError(
                f"{key}.path is empty: give a prepared data set, a folder, a glob, embedded or "
                f"synthetic (the sources are {', '.join(sources)})"
            )
        for name, value in source.items():
            if name not in SOURCE:
                raise UsageError(f"unknown config key {key}.{name}: {_nearest(name, SOURCE)}")
            check_constraint(f"{key}.{name}", value, SOURCE[name].constraint)
        if source.resolution and source.resolution < side:
            raise UsageError(
                f"{key}.resolution = {source.resolution} is less than video.resolution = {side}: "
                "raise it, or give 0"
            )
    if not any(source.weight for source in sources.values()):
        raise UsageError("data.sources: no source has a weight above 0, so there is no data")


def resolve_config(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Returns a validated copy with locked keys.

    Raises:
      UsageError: names the key, its value, and the fix.
    """
    config = ml_collections.ConfigDict(config.to_dict()).copy_and_resolve_references()
    config.lock()
    family = config.model.get("family", DEFAULT_FAMILY)
    keys = {name: key for name, key in TOP.items()}
    for section, of_section in default_sections(family).items():
        keys |= {f"{section}.{name}": key for name, key in of_section.items()}
    flat = {
        key: value for key, value in flatten_config(config).items() if not re.match(IN_SOURCE, key)
    }
    for key in flat.keys() - keys.keys():
        raise UsageError(f"unknown config key {key}: {_nearest(key, keys)}")
    for key in keys.keys() - flat.keys():
        raise UsageError(f"config key {key} is missing: begin with default_config({family!r})")
    for key, value in flat.items():
        check_constraint(key, value, keys[key].constraint)
    _check_sources(config)
    family_module(family).check(config)
    targets = config.evaluation.targets
    if not targets or not all(target > 0 for target in targets):
        raise UsageError(f"evaluation.targets = {targets}: give errors above 0, e.g. 0.003,0.015")
    if config.data.batch_size % config.optimizer.accumulate_steps:
        raise UsageError(
            f"data.batch_size = {config.data.batch_size} is not a multiple of "
            f"optimizer.accumulate_steps = {config.optimizer.accumulate_steps}"
        )
    return config


def config_to_json(config: ml_collections.ConfigDict) -> str:
    """Sorted JSON text of a config, the same text for the same config."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def read_config(path: Path) -> ml_collections.ConfigDict:
    """The resolved config in a `config.json`; keys it lacks take their default.

    Raises:
      UsageError: if the file is missing, is not JSON, or has unknown keys or bad values.
    """
    try:
        loaded = json.loads(path.read_text())
    except FileNotFoundError:
        raise UsageError(
            f"{path} is missing: give a training workdir or an exported model"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is damaged ({error}): restore it from a copy") from None
    if not isinstance(loaded, dict):
        raise UsageError(f"{path} is damaged (not a JSON object): restore it from a copy")
    values = {
        MOVED.get(key, key): value
        for key, value in flatten_config(ml_collections.ConfigDict(loaded)).items()
    }
    config = default_config(values.get("model.family", DEFAULT_FAMILY))
    if any(re.match(IN_SOURCE, key) for key in values):
        config.data.sources = ml_collections.ConfigDict()  # those that the file names, and no more
    apply_overrides(config, values)
    return resolve_config(config)
