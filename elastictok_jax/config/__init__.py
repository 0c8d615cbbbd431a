"""Configs: declared keys with defaults and constraints, overrides, validation, config.json."""

from elastictok_jax.config.defaults import default_config, source_config
from elastictok_jax.config.load import (
    flatten,
    key_docs,
    override,
    parse_value,
    read_config,
    resolve,
    to_json,
)

__all__ = [
    "default_config",
    "flatten",
    "key_docs",
    "override",
    "parse_value",
    "read_config",
    "resolve",
    "source_config",
    "to_json",
]
