"""Exported folders: `config.json` and `model.safetensors`, weights without optimizer state."""

from pathlib import Path
from typing import Any

import ml_collections

from elastictok_jax.config import read_config
from elastictok_jax.errors import UsageError
from elastictok_jax.layers.scan_layout import is_stacked, relayout_shapes
from elastictok_jax.models.elastictok.model import abstract_params
from elastictok_jax.storage.checkpoint import shape_mismatches
from elastictok_jax.storage.safetensors import load_params

WEIGHTS = "model.safetensors"


def is_exported(folder: Path) -> bool:
    """Whether a folder holds exported weights."""
    return (folder / WEIGHTS).is_file()


def read_exported(folder: Path) -> tuple[ml_collections.ConfigDict, dict[str, Any]]:
    """The config, and the weights as numpy arrays, with layers stacked or apart as in the file.

    Raises:
      UsageError: if a file is missing or damaged, or naming every weight that does not fit the
        config, with both shapes.
    """
    config = read_config(folder / "config.json")
    params, _ = load_params(folder / WEIGHTS)
    wanted = relayout_shapes(abstract_params(config), stacked=is_stacked(params))
    wrong = shape_mismatches(params, wanted)
    if wrong:
        raise UsageError(f"{folder / WEIGHTS} does not fit its config.json: {'; '.join(wrong)}")
    return config, params
