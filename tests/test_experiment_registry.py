"""Every experiment loads, documents itself, and drifts only where a golden file shows it."""

import ast
import json
from pathlib import Path

import jax
import pytest
from flax import traverse_util

from elastictok_jax import config as config_lib
from elastictok_jax import experiment_registry as registry
from elastictok_jax.errors import UsageError
from elastictok_jax.models.elastictok.model import build_elastictok_model, init_elastictok_model
from elastictok_jax.parallel.mesh import AXES, mesh_sizes
from elastictok_jax.parallel.sharding import param_specs
from tests.tiny import sequence_tokens

GOLDEN = Path(__file__).parent / "golden"
NAMES = registry.experiment_names()
STAGES = [
    "mixture:stage=video",
    *(f"elastictok_fsq:stage={stage}" for stage in ("video", "64k", "512k", "1m")),
    *(f"elastictok_vae:stage={stage}" for stage in ("video", "64k", "512k")),
]
EXPERIMENT = """
from elastictok_jax.config import default_config

def get_config(arg="none"):
    config = default_config()
    config.data.sources.main.path = arg
    return config
"""


def golden_name(name):
    return f"{name.replace(':', '-')}.json"


def describe(name):
    """Resolved config and parameter tree of an experiment, as JSON shows them: of each weight its
    shape, logical axes, and what mesh axes cut it where each has two devices."""
    config = config_lib.resolve_config(registry.get_experiment(name))
    boxed = jax.eval_shape(
        lambda: init_elastictok_model(build_elastictok_model(config), jax.random.key(0))
    )
    specs = traverse_util.flatten_dict(param_specs(boxed, dict.fromkeys(AXES, 2)))
    parameters = {
        "/".join(key): {
            "shape": list(leaf.value.shape),
            "axes": list(leaf.names),
            "mesh": [list(part) if isinstance(part, tuple) else part for part in specs[key]],
        }
        for key, leaf in sorted(traverse_util.flatten_dict(boxed).items())
    }
    return {"config": json.loads(config_lib.config_to_json(config)), "parameters": parameters}


def write_golden(path, described):
    """JSON with one weight a line."""
    config = json.dumps(described["config"], indent=1)
    weights = ",\n".join(
        f"  {json.dumps(name)}: {json.dumps(weight)}"
        for name, weight in described["parameters"].items()
    )
    text = f'{{"config": {config},\n "parameters": {{\n{weights}\n }}\n}}\n'
    assert json.loads(text) == described
    path.write_text(text)


def test_there_are_experiments():
    assert "quickstart" in NAMES


@pytest.mark.parametrize("name", NAMES + STAGES)
def test_experiment_is_as_its_golden_file_says(name, update_golden):
    path, got = GOLDEN / golden_name(name), describe(name)
    if update_golden:
        path.parent.mkdir(exist_ok=True)
        write_golden(path, got)
    assert path.is_file(), "run pytest --update-golden and review the new file"
    assert got == json.loads(path.read_text()), "if meant: pytest --update-golden, then review"


def test_every_golden_file_has_an_experiment():
    assert {path.name for path in GOLDEN.glob("*")} == {golden_name(n) for n in NAMES + STAGES}


@pytest.mark.parametrize("name", NAMES)
def test_docstring_says_what_to_expect(name):
    source = (registry.experiments_folder() / f"{name}.py").read_text()
    doc = ast.get_docstring(ast.parse(source)) or ""
    missing = [
        word
        for word in ("Paper", "Command", "Hardware", "Time", "Result")
        if f"\n{word}:" not in f"\n{doc}"
    ]
    assert not missing
    assert f"elastictok train {name}" in doc or f"elastictok sweep {name}" in doc


@pytest.mark.parametrize("name", NAMES)
def test_experiment_is_named_after_its_file(name):
    assert registry.get_experiment(name).name == name


def test_experiment_file_with_and_without_argument(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(EXPERIMENT)
    plain = registry.get_experiment(str(path))
    assert (plain.name, plain.data.sources.main.path) == ("mine", "none")
    given = registry.get_experiment(f"{path}:big:1")
    assert (given.name, given.data.sources.main.path) == ("mine:big:1", "big:1")
    path.write_text(EXPERIMENT.replace('"none"', '"again"'))
    assert (
        registry.get_experiment(str(path)).data.sources.main.path == "again"
    )  # read anew each time


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        *(("elastictok_fsq:stage=image", 2**12), ("elastictok_fsq:stage=video", 2**14)),
        *(("elastictok_fsq:stage=64k", 2**16), ("elastictok_fsq:stage=512k", 2**19)),
        *(("elastictok_fsq:stage=1m", 2**20), ("elastictok_vae:stage=image", 2**11)),
        *(("elastictok_vae:stage=video", 2**14), ("elastictok_vae:stage=64k", 2**16)),
        ("elastictok_vae:stage=512k", 2**19),
    ],
)
def test_stages_of_the_paper_have_its_contexts_and_fit_its_pod(name, tokens):
    config = config_lib.resolve_config(registry.get_experiment(name))
    assert sequence_tokens(config) == tokens
    assert config.data.batch_size * tokens == 2**20  # 4096 tokens on each chip of a v4-512
    sizes = mesh_sizes(config, devices=256)
    assert config.data.batch_size % (sizes["data"] * sizes["fsdp"]) == 0
    assert config.data.sequence_blocks % sizes["sequence"] == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("elastictok_fsq:stage=2m", r"elastictok_fsq:stage=image\|video\|64k\|512k\|1m"),
        ("elastictok_fsq:1m", r"elastictok_fsq:1m: give elastictok_fsq:stage="),
        ("elastictok_vae:stage=1m", r"the paper's VAE goes up to 512K .* elastictok_fsq has stage"),
    ],
)
def test_a_stage_that_is_not_there(name, message):
    with pytest.raises(UsageError, match=message):
        registry.get_experiment(name)


def test_each_call_gives_a_config_of_its_own():
    first = registry.get_experiment("quickstart")
    first.model.width = 3
    assert registry.get_experiment("quickstart").model.width != 3


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(UsageError, match=r"no experiment named quickstrat: did you mean quickst"):
        registry.get_experiment("quickstrat")
    with pytest.raises(UsageError, match=r"zzzz: registered are .*quickstart.*path/file\.py"):
        registry.get_experiment("zzzz")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "does not exist"),
        ("x = 1\n", r"defines no get_config\(\)"),
        ("def get_config(:\n", r"does not parse: .*line 1"),
    ],
)
def test_bad_experiment_files(tmp_path, source, message):
    path = tmp_path / "bad.py"
    if source is not None:
        path.write_text(source)
    with pytest.raises(UsageError, match=message) as caught:
        registry.get_experiment(str(path))
    assert str(path) in str(caught.value)


def test_argument_where_none_is_taken_and_none_where_one_is_needed(tmp_path):
    path = tmp_path / "plain.py"
    path.write_text("def get_config():\n    pass\n")
    with pytest.raises(UsageError, match=r"plain\.py:big: .*it takes none: drop it"):
        registry.get_experiment(f"{path}:big")
    path.write_text("def get_config(size):\n    pass\n")
    with pytest.raises(UsageError, match=r"it needs one: give .*plain\.py:ARG"):
        registry.get_experiment(str(path))
