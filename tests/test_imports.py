"""Imports flow one way: a module imports rooms below its own, never above or beside."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "elastictok_jax"
# From the ground up. Rooms of one line are siblings that do not import each other; the longest
# name that a module begins with is its room.
ROOMS = (
    ("errors", "hardware"),
    ("paths", "progress", "pixels", "masking", "streams", "ctrl_c", "experiment_registry"),
    ("storage.atomic", "storage.outputs"),
    ("storage.csv_files", "storage.references", "storage.safetensors", "parallel"),
    ("layers",),
    ("models.base",),
    ("models.registry",),
    ("config",),
    ("storage.checkpoint", "perceptual"),
    ("losses", "data"),
    ("models",),
    ("training", "tokenizer"),
    ("interop", "aot"),
    ("evaluation",),
    ("cli",),
    ("__main__", "__init__"),
)
RANKS = {room: rank for rank, rooms in enumerate(ROOMS) for room in rooms}


def room_of(module: str) -> str:
    """Returns the room of a module named from the package on."""
    parts = module.split(".")
    names = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    for name in names:
        if name in RANKS:
            return name
    raise AssertionError(f"{module} is in no room of ROOMS")


def imported(source: str) -> list[str]:
    """Returns the modules of the package that a source imports anywhere, also in functions."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    inside = [name.removeprefix("elastictok_jax.") for name in names if "elastictok_jax." in name]
    return [name for name in inside if not name.startswith(("__version__", "Elastic", "Tokens"))]


def climbs(module: str, source: str) -> list[str]:
    """Returns the imports of a module that do not lie below it."""
    if not imported(source):
        return []
    room = room_of(module)
    return [
        f"{module} imports {name}"
        for name in imported(source)
        if room_of(name) != room and RANKS[room_of(name)] >= RANKS[room]
    ]


def modules() -> dict[str, str]:
    """Returns the source of each module of the package, by name."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path.read_text()
        for path in sorted(PACKAGE.rglob("*.py"))
        if "experiments" not in path.parts
    }


def test_no_import_climbs():
    found = [climb for module, source in modules().items() for climb in climbs(module, source)]
    assert found == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("training.step", "from elastictok_jax.tokenizer.api import ElasticTokenizer"),
        ("data.packing", "from elastictok_jax.models.autoencoder import MASKING"),
        ("layers.patching", "def f():\n    import elastictok_jax.config.load"),
        ("models.elastictok.codec", "from elastictok_jax.training import step"),
        ("tokenizer.goal", "from elastictok_jax import evaluation\nimport elastictok_jax.cli"),
    ],
)
def test_a_planted_climb_is_found(module, source):
    assert climbs(module, source)


def test_no_family_is_named_outside_its_folder():
    for module, source in modules().items():
        if module.startswith(("models.elastictok", "interop")):
            continue
        assert not [name for name in imported(source) if name.startswith("models.elastictok")], (
            module
        )
