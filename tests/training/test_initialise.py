"""A new run takes the weights that fit, names those that do not, and goes on in either layout."""

import json
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from elastictok_jax import cli
from elastictok_jax.config import apply_overrides, config_to_json, read_config, resolve_config
from elastictok_jax.errors import UsageError
from elastictok_jax.experiment_registry import get_experiment
from elastictok_jax.layers.scan_layout import stack_or_unstack
from elastictok_jax.storage.safetensors import load_safetensors, save_safetensors
from elastictok_jax.tokenizer.api import ElasticTokenizer
from elastictok_jax.training.initialise import initialise
from elastictok_jax.training.metric_writers import read_metrics
from tests.tiny import abstract_state, mesh_of

pytestmark = pytest.mark.xdist_group("initialise")  # one worker makes what they share

OPTIONS = {
    "model.width": 16,
    "model.mlp_width": 32,
    "model.encoder_layers": 1,
    "model.decoder_layers": 2,
    "model.heads": 1,
    "video.resolution": 16,
    "masking.min_tokens": 1,
    "optimizer.warmup_steps": 2,
    "optimizer.schedule": "constant",
    "train.steps": 4,
    "train.log_every": 1,
    "train.checkpoint_every": 2,
    "data.batch_size": 2,
    "data.sequence_blocks": 2,
    "train.eval_every": 1000,
    "evaluation.batches": 1,
    "evaluation.report": "false",
}


def run(workdir, **options) -> int:
    values = OPTIONS | {key.replace("__", "."): value for key, value in options.items()}
    words = [f"--config.{key}={value}" for key, value in values.items()]
    return cli.main(["train", "quickstart", "--workdir", str(workdir), *words])


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    """Speed is not tested here, and compiling is most of the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 4 steps, its evaluation weights, and the same exported."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    assert run(workdir) == 0
    params = jax.device_get(ElasticTokenizer.from_pretrained(workdir).params)
    exported = workdir.parent / "exported"
    exported.mkdir()
    save_safetensors(exported / "model.safetensors", params, metadata={})
    shutil.copy(workdir / "config.json", exported)
    return workdir, exported, flatten_dict(params, sep="/")


def random_state(abstract):
    """Quicker than compiling the initialisation."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jax.device_put(
            np.asarray(rng.normal(size=leaf.shape), leaf.dtype), leaf.sharding
        ),
        abstract,
    )


def begin(source, tmp_path, **options):
    """(initial, resulting, record, lines) of a run that starts with the weights of `source`."""
    config = get_experiment("quickstart")
    values = OPTIONS | {key.replace("__", "."): value for key, value in options.items()}
    apply_overrides(config, values | {"train.init_from": str(source), "seed": 1})
    config = resolve_config(config)
    abstract = abstract_state(config, mesh_of(config))
    state = random_state(abstract)
    initial = flatten_dict(jax.device_get(state.params["model"]), sep="/")
    state, lines = initialise(state, abstract, config=config, workdir=tmp_path)
    got = flatten_dict(jax.device_get(state.params["model"]), sep="/")
    averages = flatten_dict(jax.device_get(state.ema_params["model"]), sep="/")
    jax.tree.map(np.testing.assert_array_equal, averages, got)
    return initial, got, json.loads((tmp_path / "init_from.json").read_text()), lines


@pytest.mark.parametrize("kind", ["workdir", "exported"])
@pytest.mark.parametrize("scan_layers", [True, False])
def test_next_stage_takes_every_weight(trained, kind, scan_layers, tmp_path):
    """With a longer context and another rotary base, from either kind of model."""
    workdir, exported, want = trained
    source = workdir if kind == "workdir" else exported
    longer = dict(data__sequence_blocks=4, model__rope_theta=1e6, compute__scan_layers=scan_layers)
    _, got, record, lines = begin(source, tmp_path, **longer)
    if not scan_layers:
        nested = stack_or_unstack(unflatten_dict(want, sep="/"), stacked=False)
        want = flatten_dict(nested, sep="/")
    assert got.keys() == want.keys()
    jax.tree.map(np.testing.assert_array_equal, got, dict(want))
    assert len(record["taken"]) > 20 and not record["skipped"] and not record["reinitialised"]
    assert len(lines) == 1 and f"{len(record['taken'])} taken, 0 re-initialised" in lines[0]


CHANGES = {
    "another bottleneck": (
        {"model__bottleneck": "vae"},
        {"encoder/out_proj/kernel": [16, 16], "decoder/in_proj/kernel": [8, 16]},
        set(),
    ),
    "another patch": (
        {"model__patch": "2,4,4"},
        {"encoder/in_proj/kernel": [96, 16], "decoder/out_proj/kernel": [16, 96]},
        set(),
    ),
    "not conditioned": (
        {"model__conditioned": False},
        {},
        {"encoder/kept_embed", "encoder/dropped_embed"},
    ),
}


@pytest.mark.parametrize("kind", ["workdir", "exported"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_does_not_fit_is_named_and_starts_anew_only_when_asked(
    trained, kind, change, tmp_path
):
    workdir, exported, trained_params = trained
    source = workdir if kind == "workdir" else exported
    options, anew, skipped = CHANGES[change]
    with pytest.raises(UsageError) as caught:
        begin(source, tmp_path, **options)
    for name in anew:
        saved, model = trained_params[name].shape, tuple(anew[name])
        assert f"{name}: {saved} saved, {model} asked for" in str(caught.value)
    for name in skipped:
        assert f"{name}: (16,) saved, none asked for" in str(caught.value)
    assert str(caught.value).count(" saved, ") == len(anew) + len(skipped)
    assert "train.init_from_mismatch=reinitialise" in str(caught.value)
    assert not (tmp_path / "init_from.json").exists()

    options = options | {"train__init_from_mismatch": "reinitialise"}
    initial, got, record, lines = begin(source, tmp_path, **options)
    for name, value in got.items():
        np.testing.assert_array_equal(
            value, initial[name] if name in anew else trained_params[name]
        )
    assert set(record["taken"]) == got.keys() - set(anew)
    assert record["skipped"] == {name: [16] for name in skipped}
    assert {n: shapes["model"] for n, shapes in record["reinitialised"].items()} == anew
    assert len(lines) == 1 + len(anew) + len(skipped)
    assert all(any(name in line for line in lines) for name in {*anew, *skipped})


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("kind", ["workdir", "exported"])
def test_another_depth_takes_layer_by_layer(trained, kind, scan_layers, tmp_path):
    """One encoder layer more than the checkpoint has, one decoder layer fewer."""
    workdir, exported, trained_params = trained
    depth = dict(model__encoder_layers=2, model__decoder_layers=1, compute__scan_layers=scan_layers)
    initial, got, record, _ = begin(
        workdir if kind == "workdir" else exported,
        tmp_path,
        train__init_from_mismatch="reinitialise",
        **depth,
    )
    apart = [
        flatten_dict(stack_or_unstack(unflatten_dict(tree, sep="/"), stacked=False), sep="/")
        for tree in (initial, got, trained_params)
    ]
    for name, value in apart[1].items():
        new = name.startswith("encoder/layers_1/")
        np.testing.assert_array_equal(value, apart[0][name] if new else apart[2][name])
    assert all(name.startswith("decoder/layers_1/") for name in record["skipped"])
    assert all(name.startswith("encoder/layers_1/") for name in record["reinitialised"])
    assert len(record["skipped"]) == len(record["reinitialised"]) == 9


def test_a_model_of_which_nothing_fits_is_refused(trained, tmp_path):
    with pytest.raises(UsageError, match="no weight fits, so nothing would be taken"):
        begin(
            trained[0],
            tmp_path,
            model__width=32,
            model__mlp_width=64,
            train__init_from_mismatch="reinitialise",
        )


def test_an_exported_folder_that_does_not_fit_its_config_is_refused(trained, tmp_path):
    _, exported, params = trained
    shutil.copy(exported / "config.json", tmp_path)
    damaged = {name: value for name, value in params.items() if name != "decoder/norm/scale"}
    damaged["encoder/layers_7/strange"] = np.zeros(3, np.float32)
    nested = unflatten_dict(damaged, sep="/")
    save_safetensors(tmp_path / "model.safetensors", nested, metadata={})
    with pytest.raises(UsageError) as caught:
        begin(tmp_path, tmp_path)
    assert "decoder/norm/scale: none saved, (16,) asked for" in str(caught.value)
    assert "encoder/layers_7/strange: (3,) saved, none asked for" in str(caught.value)


def test_the_command_line_says_what_was_taken(trained, tmp_path, capsys):
    options = dict(model__bottleneck="vae", train__init_from=trained[0], train__steps=1)
    assert run(tmp_path / "refused", **options) == 2
    error = capsys.readouterr().err
    assert "decoder/in_proj/kernel: (6, 16) saved, (8, 16) asked for" in error
    assert "Traceback" not in error
    assert run(tmp_path / "run", train__init_from_mismatch="reinitialise", **options) == 0
    text = capsys.readouterr().err
    assert "re-initialised, 0 skipped (all in init_from.json)" in text
    assert "not taken: decoder/in_proj/kernel: (6, 16) saved, (8, 16) asked for" in text
    assert (tmp_path / "run" / "init_from.json").is_file()


def losses_of(workdir):
    lines = read_metrics(workdir / "metrics.jsonl")
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_a_run_goes_on_in_the_other_layout(trained, tmp_path):
    """Losses of the steps after agree with those of a run that never changed."""
    workdir = tmp_path / "changed"
    shutil.copytree(trained[0], workdir)
    plain = tmp_path / "plain"
    shutil.copytree(trained[0], plain)
    assert run(workdir, train__steps=8, compute__scan_layers=False) == 0
    assert run(plain, train__steps=8) == 0
    got, want = map(losses_of, (workdir, plain))
    assert got.keys() == want.keys() == set(range(1, 9))
    assert got == pytest.approx(want, rel=1e-4)
    assert not read_config(workdir / "config.json").compute.scan_layers


@pytest.mark.parametrize("kind", ["workdir", "exported"])
def test_a_tokenizer_reads_either_layout(trained, kind, tmp_path):
    workdir, exported, _ = trained
    folder = tmp_path / "model"
    shutil.copytree(workdir if kind == "workdir" else exported, folder)
    clip = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    want = ElasticTokenizer.from_pretrained(folder)
    config = read_config(folder / "config.json")
    config.compute.scan_layers = False
    (folder / "config.json").write_text(config_to_json(config))
    got = ElasticTokenizer.from_pretrained(folder)
    assert "layers_1" in got.params["decoder"] and "layers" in want.params["decoder"]
    assert got.fingerprint == want.fingerprint
    tokens = got.encode(clip, tokens=5)
    np.testing.assert_array_equal(tokens.codes[0], want.encode(clip, tokens=5).codes[0])
    # And weights that were saved apart.
    params = stack_or_unstack(jax.device_get(got.params), stacked=False)
    save_safetensors(folder / "model.safetensors", params, metadata={})
    assert "layers_1" in load_safetensors(folder / "model.safetensors")[0]["decoder"]
    config.compute.scan_layers = True
    (folder / "config.json").write_text(config_to_json(config))
    again = ElasticTokenizer.from_pretrained(folder)
    assert again.fingerprint == want.fingerprint
    jax.tree.map(np.testing.assert_array_equal, again.params, want.params)
