"""Finds experiments by name or path and returns their configs."""

import difflib
import importlib.util
import inspect
import sys
from pathlib import Path

import ml_collections

from elastictok_jax.errors import UsageError


def experiments_folder() -> Path:
    """Returns the folder of registered experiments: in the package, or beside it in a checkout."""
    package = Path(__file__).parent
    installed = package / "experiments"
    return installed if installed.is_dir() else package.parent / "experiments"


def experiment_names() -> list[str]:
    """Returns the names of all registered experiments."""
    files = experiments_folder().glob("*.py")
    return sorted(path.stem for path in files if not path.stem.startswith("_"))


def get_experiment(experiment: str) -> ml_collections.ConfigDict:
    """Returns the config of a registered name or of `path/file.py`, with an optional `:arg`.

    Calls `get_config()` of the file, or `get_config(arg)`.

    Raises:
      UsageError: if there is no such experiment, its file does not define get_config, or that does
        not take such an argument.
    """
    name, colon, arg = experiment.partition(":")
    if name.endswith(".py"):
        path = Path(name).expanduser()
        if not path.is_file():
            raise UsageError(f"experiment file {name} does not exist")
    else:
        known = experiment_names()
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"registered are {', '.join(known)}"
            raise UsageError(f"no experiment named {name}: {hint} (or give a path/file.py)")
        path = experiments_folder() / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"elastictok_experiment_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UsageError(f"experiment file {path} does not parse: {error}") from None
    if not hasattr(module, "get_config"):
        raise UsageError(f"experiment file {path} defines no get_config()")
    arguments = (arg,) if colon else ()
    try:
        inspect.signature(module.get_config).bind(*arguments)
    except TypeError:
        fix = "it takes none: drop it" if colon else f"it needs one: give {name}:ARG"
        raise UsageError(f"experiment {experiment}: wrong use of its argument, {fix}") from None
    config = module.get_config(*arguments)
    config.name = path.stem + (f":{arg}" if colon else "")
    return config
