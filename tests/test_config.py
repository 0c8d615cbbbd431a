"""Overrides take the default's type, and every wrong value is named with its fix."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastictok_jax import config as config_lib
from elastictok_jax.config.defaults import SOURCE, TOP, default_sections
from elastictok_jax.config.schema import POSITIVE, OneOf, check_constraint
from elastictok_jax.errors import UsageError
from elastictok_jax.models.registry import DEFAULT_FAMILY
from tests.tiny import block_tokens, sequence_tokens


def changed(**overrides):
    config = config_lib.default_config()
    config_lib.apply_overrides(config, {key.replace("__", "."): v for key, v in overrides.items()})
    return config


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("train.steps", "12", 12),
        ("train.steps", "200_000", 200_000),
        ("train.steps", 7, 7),
        ("optimizer.learning_rate", "3e-4", 3e-4),
        ("optimizer.clip_norm", "2", 2.0),
        ("optimizer.clip_norm", 2, 2.0),
        ("data.sources.main.flip", "false", False),
        ("data.sources.main.flip", "True", True),
        ("data.sources.main.flip", "0", False),
        ("data.sources.main.flip", False, False),
        ("model.patch", "2,8,8", (2, 8, 8)),
        ("model.patch", "(2, 8, 8)", (2, 8, 8)),
        ("model.patch", [2, 8, 8], (2, 8, 8)),
        ("model.fsq_levels", "[8,5,]", (8, 5)),
        ("evaluation.targets", "0.1,1", (0.1, 1.0)),
        ("data.sources.main.path", "/a/folder", "/a/folder"),
        ("mesh.data", "-1", -1),
    ],
)
def test_override_takes_the_type_of_the_default(key, text, value):
    got = config_lib.flatten_config(changed(**{key: text}))[key]
    assert got == value and type(got) is type(value)
    if isinstance(value, tuple):
        assert [type(item) for item in got] == [type(item) for item in value]


def test_override_leaves_the_rest_alone():
    before = config_lib.flatten_config(config_lib.default_config())
    after = config_lib.flatten_config(changed(model__width="512"))
    assert {key for key in before if before[key] != after[key]} == {"model.width"}
    assert before.keys() == after.keys()


@given(st.integers(-(10**9), 10**9), st.floats(allow_nan=False, allow_infinity=False))
@settings(max_examples=30)
def test_numbers_survive_their_text(integer, real):
    config = changed(seed=str(integer), loss__kl_weight=str(real))
    assert config.seed == integer and config.loss.kl_weight == real


def test_unknown_key_suggests_the_nearest():
    with pytest.raises(UsageError, match=r"model\.widht: did you mean model\.width\?"):
        changed(model__widht=3)
    with pytest.raises(UsageError, match=r"qqqqqqqq: keys are .*model\.width"):
        changed(qqqqqqqq=3)
    with pytest.raises(UsageError, match="unknown config key model: "):
        changed(model="big")  # a group is not a value


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.steps", "many"),
        ("train.steps", "1.5"),
        ("optimizer.learning_rate", "fast"),
        ("data.sources.main.flip", "maybe"),
        ("model.patch", "a,b,c"),
        ("model.patch", 3),
        ("train.steps", None),
    ],
)
def test_value_of_another_type(key, value):
    with pytest.raises(UsageError) as caught:
        changed(**{key: value})
    assert str(caught.value).startswith(f"config key {key}: {value!r} is not ")
    assert "now" in str(caught.value)  # shows what a right value looks like


def test_a_fraction_does_not_become_an_int_in_silence():
    with pytest.raises(UsageError, match=r"config key train\.steps: 1\.5 is not int"):
        changed(train__steps=1.5)
    with pytest.raises(UsageError, match=r"config key model\.patch: \[1\.5, 8, 8\] is not tuple"):
        changed(model__patch=[1.5, 8, 8])
    assert changed(train__steps=3.0).train.steps == 3


def keys_with(constraint):
    """Returns (key, its constraint) of every declared key whose constraint `constraint` takes."""
    declared = {
        f"{section}.{name}": key.constraint
        for section, keys in default_sections(DEFAULT_FAMILY).items()
        for name, key in keys.items()
    }
    return [(key, declared[key]) for key in declared if constraint(declared[key])]


@pytest.mark.parametrize(
    ("key", "choice"), keys_with(lambda constraint: isinstance(constraint, OneOf))
)
def test_choices(key, choice):
    with pytest.raises(UsageError) as caught:
        config_lib.resolve_config(changed(**{key: "nonsense"}))
    assert str(caught.value) == f"{key} = 'nonsense': choose one of {choice.words}"
    for value in choice.words.split(", "):
        config_lib.resolve_config(changed(**{key: value}))


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("key", [key for key, _ in keys_with(lambda c: c is POSITIVE)])
def test_what_must_be_positive(key, value):
    with pytest.raises(UsageError) as caught:
        config_lib.resolve_config(changed(**{key: value}))
    assert str(caught.value).startswith(f"{key} = ")
    assert str(caught.value).endswith("must be greater than 0")


def test_every_key_says_what_it_means():
    for section, keys in (default_sections(DEFAULT_FAMILY) | {"source": SOURCE, "": TOP}).items():
        for name, key in keys.items():
            assert key.doc and len(key.doc) <= 80, (section, name)
            if key.constraint and (section, name) != ("source", "path"):
                check_constraint(name, key.default, key.constraint)


def test_keys_that_nobody_declared_are_refused():
    config = config_lib.default_config()
    config.model.widht = 3
    with pytest.raises(
        UsageError, match=r"unknown config key model\.widht: did you mean model\.width"
    ):
        config_lib.resolve_config(config)
    config = config_lib.default_config()
    config.model.attention = "dense"  # as before config.compute existed
    with pytest.raises(UsageError, match=r"model\.attention: it is compute\.attention now"):
        config_lib.resolve_config(config)
    del config.model["attention"], config.model["width"]
    with pytest.raises(UsageError, match=r"config key model\.width is missing"):
        config_lib.resolve_config(config)


def test_another_family_is_refused_by_name():
    config = config_lib.default_config()
    config.model.family = "nonesuch"
    with pytest.raises(UsageError, match=r"model\.family = 'nonesuch': choose one of elastictok"):
        config_lib.resolve_config(config)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model.heads": 3}, "model.width = 1024 over model.heads = 3: heads must divide width"),
        ({"model.width": 24, "model.heads": 8}, "even head widths"),
        ({"model.fsq_levels": "8,1"}, "model.fsq_levels = (8, 1): each must be at least 2"),
        ({"model.fsq_levels": ""}, "model.fsq_levels = (): each must be at least 2"),
        ({"model.patch": "8,8"}, "model.patch = (8, 8): must be three positive sizes"),
        ({"model.patch": "0,8,8"}, "model.patch = (0, 8, 8): must be three positive sizes"),
        ({"video.resolution": 250}, "multiples of model.patch = (1, 8, 8)"),
        ({"video.frames_per_block": 3, "model.patch": "2,8,8"}, "multiples of model.patch"),
        ({"masking.min_tokens": 4097}, "masking.min_tokens = 4097 is more than the 4096 tokens"),
        (
            {"masking.kind": "powers_of_two", "masking.min_tokens": 70, "video.resolution": 40},
            "no power of two in [70, 100]",
        ),
        ({"masking.fraction": 0}, "masking.fraction = 0.0: must be in (0, 1]"),
        ({"masking.fraction": 1.1}, "masking.fraction = 1.1: must be in (0, 1]"),
        ({"optimizer.ema_decay": 1}, "optimizer.ema_decay = 1.0: must be in [0, 1)"),
        ({"data.eval_fraction": 1}, "data.eval_fraction = 1.0: must be in [0, 1)"),
        ({"data.max_bad_fraction": -0.1}, "data.max_bad_fraction = -0.1: must be in [0, 1]"),
        ({"data.sources.web.weight": 2}, "data.sources.web.path is empty: give a prepared data"),
        ({"data.sources.main.kind": "gif"}, "main.kind = 'gif': choose one of any, image, video"),
        ({"data.sources.main.crop": "top"}, "main.crop = 'top': choose one of random, center"),
        ({"data.sources.main.weight": -1}, "data.sources.main.weight = -1.0: must be 0 or more"),
        (
            {"data.sources.main.sequences": 0},
            "data.sources.main.sequences = 0: must be greater than 0",
        ),
        ({"data.sources.main.weight": 0}, "no source has a weight above 0"),
        (
            {"data.sources.main.resolution": 128},
            "data.sources.main.resolution = 128 is less than video.resolution = 256",
        ),
        (
            {"optimizer.accumulate_steps": 3},
            "data.batch_size = 8 is not a multiple of optimizer.accumulate_steps = 3",
        ),
    ],
)
def test_values_that_do_not_fit_each_other(overrides, message):
    with pytest.raises(UsageError) as caught:
        config_lib.resolve_config(changed(**overrides))
    assert message in str(caught.value)


def test_resolve_copies_and_locks():
    config = changed(model__width=512)
    resolved = config_lib.resolve_config(config)
    config.model.width = 256
    assert resolved.model.width == 512
    with pytest.raises(AttributeError):
        resolved.model.widht = 3
    with pytest.raises(KeyError):
        resolved["new"] = 3


def test_derived_sizes_are_those_of_the_paper():
    config = config_lib.resolve_config(config_lib.default_config())
    assert block_tokens(config) == 4096
    assert sequence_tokens(config) == 4 * 4096
    vae = config_lib.resolve_config(changed(model__bottleneck="vae", model__patch="2,8,8"))
    assert block_tokens(vae) == 2048


@given(
    width=st.sampled_from([64, 512]),
    levels=st.lists(st.integers(2, 9), min_size=1, max_size=6),
    rate=st.floats(1e-8, 1.0),
    source=st.text(min_size=1, max_size=20),
)
@settings(max_examples=25)
def test_json_round_trip(tmp_path_factory, width, levels, rate, source):
    config = config_lib.default_config()
    values = {"model.width": width, "model.fsq_levels": levels}
    values |= {"optimizer.learning_rate": rate, "data.sources.main.path": source}
    config_lib.apply_overrides(config, values)
    config = config_lib.resolve_config(config)
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_text(config_lib.config_to_json(config))
    back = config_lib.read_config(path)
    assert config_lib.flatten_config(back) == config_lib.flatten_config(config)
    assert config_lib.config_to_json(back) == path.read_text()


def test_a_key_of_a_new_source_adds_it():
    config = changed(data__sources__web__path="/a/folder", data__sources__web__weight=3)
    assert set(config.data.sources) == {"main", "web"}
    assert (config.data.sources.web.weight, config.data.sources.web.kind) == (3.0, "any")
    with pytest.raises(UsageError, match=r"web\.wieght: did you mean data\.sources\.web\.weight"):
        changed(data__sources__web__wieght=3)


def test_a_config_file_has_the_sources_it_names_and_no_more(tmp_path):
    config = changed(data__sources__web__path="/a/folder", data__sources__web__weight=3)
    del config.data.sources["main"]
    path = tmp_path / "config.json"
    path.write_text(config_lib.config_to_json(config_lib.resolve_config(config)))
    back = config_lib.read_config(path)
    assert list(back.data.sources) == ["web"]
    assert config_lib.config_to_json(back) == path.read_text()


def test_older_config_files_take_defaults_for_what_they_lack(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model": {"width": 512}}))
    config = config_lib.read_config(path)
    assert config.model.width == 512
    assert config.model.mlp_width == config_lib.default_config().model.mlp_width


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing: give a training workdir or an exported model"),
        (b"{", "is damaged"),
        (b"[1]", "is damaged (not a JSON object)"),
        (b"\xff\xfe", "is damaged"),
        (b'{"model": {"widht": 3}}', "did you mean model.width?"),
        (b'{"model": {"width": "big"}}', "config key model.width: 'big' is not int"),
        (b'{"model": {"width": 0}}', "model.width = 0: must be greater than 0"),
        (b'{"model": 3}', "unknown config key model"),
    ],
)
def test_bad_config_files(tmp_path, content, message):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        config_lib.read_config(path)
    assert message in str(caught.value)
