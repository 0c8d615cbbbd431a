"""Configs: declared keys with defaults and constraints, overrides, validation, config.json."""

from elastictok_jax.config.defaults import default_config, default_source_config
from elastictok_jax.config.key_docs import key_docs
from elastictok_jax.config.load import (
    apply_overrides,
    config_to_json,
    flatten_config,
    parse_config_value,
    read_config,
    resolve_config,
)

__all__ = [
    "apply_overrides",
    "config_to_json",
    "default_config",
    "default_source_config",
    "flatten_config",
    "key_docs",
    "parse_config_value",
    "read_config",
    "resolve_config",
]
