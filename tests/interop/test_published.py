"""Published checkpoints import exactly; damaged, hostile and ill-fitting ones say what is wrong."""

import json
import tracemalloc
from pathlib import Path

import flax.serialization
import jax
import ml_dtypes
import msgpack
import numpy as np
import pytest
from flax import traverse_util
from hypothesis import given, settings
from hypothesis import strategies as st

from elastictok_jax import config as config_lib
from elastictok_jax.errors import UsageError
from elastictok_jax.interop.published import (
    convert_config,
    import_params,
    import_published,
)
from elastictok_jax.interop.published_stream import read_published_stream
from elastictok_jax.storage.safetensors import load_safetensors
from tests.tiny import abstract_params

REFERENCE = Path(__file__).parents[1] / "reference_parity"
FILES = {
    "fsq_image": REFERENCE / "fsq_image" / "streaming_params",
    "vae_video": REFERENCE / "vae_video" / "streaming_train_state",
}
FSQ = FILES["fsq_image"]


def settings_of(case):
    return json.loads((REFERENCE / case / "config.json").read_text())


def abstract_of(case, *, conditioned=True):
    config = config_lib.default_config()
    config_lib.apply_overrides(config, convert_config(settings_of(case), conditioned=conditioned))
    return abstract_params(config_lib.resolve_config(config))


@pytest.fixture(scope="module")
def fsq_abstract():
    return abstract_of("fsq_image")


@pytest.fixture(scope="module")
def fsq_weights():
    return dict(read_published_stream(FSQ))


def write_stream(path, weights):
    path.write_bytes(
        b"".join(
            msgpack.packb((key, flax.serialization.to_bytes(value)))
            for key, value in weights.items()
        )
    )
    return path


def write_raw(path, value, *, key=("encoder", "in_proj", "kernel")):
    """One pair whose value is the msgpack of anything."""
    path.write_bytes(msgpack.packb((key, msgpack.packb(value))))
    return path


def array_fields(*fields):
    return msgpack.ExtType(1, msgpack.packb(fields))


def layers_apart(weights):
    apart = {}
    for key, array in weights.items():
        if "scan_decoder" in key:
            at = key.index("scan_decoder")
            for layer, part in enumerate(array):
                apart[(*key[:at], str(layer), *key[at + 1 :])] = part
        else:
            apart[key] = array
    return apart


def assert_trees_equal(got, want):
    got, want = traverse_util.flatten_dict(got), traverse_util.flatten_dict(want)
    assert got.keys() == want.keys()
    for key in want:
        np.testing.assert_array_equal(got[key], want[key], err_msg="/".join(key))


@pytest.mark.parametrize("case", FILES)
def test_reference_files_fill_our_tree(case):
    abstract = abstract_of(case)
    params = import_params(FILES[case], abstract_params=abstract)
    assert jax.tree.structure(params) == jax.tree.structure(abstract)
    for got, want in zip(jax.tree.leaves(params), jax.tree.leaves(abstract), strict=True):
        assert got.shape == want.shape and got.dtype == np.float32
        assert np.isfinite(got).all()


def test_every_weight_lands_in_its_place(fsq_abstract, fsq_weights):
    params = import_params(FSQ, abstract_params=fsq_abstract)
    enc, dec = params["encoder"], params["decoder"]
    blocks = ("decoder", "decoder_blocks", "scan_decoder")
    layers = dec["layers"]
    for ours, published in [
        (enc["kept_embed"], ("encoder", "is_kept_embed")),
        (enc["dropped_embed"], ("encoder", "is_masked_embed")),
        (enc["out_proj"]["kernel"], ("encoder", "pre_quant", "kernel")),
        (dec["in_proj"]["kernel"], ("decoder", "post_quant", "kernel")),
        (dec["norm"]["scale"], ("decoder", "ln_f", "kernel")),
        (layers["attention"]["query"]["kernel"], (*blocks, "attention", "wq", "kernel")),
        (layers["attention"]["key"]["kernel"], (*blocks, "attention", "wk", "kernel")),
        (layers["attention"]["value"]["kernel"], (*blocks, "attention", "wv", "kernel")),
        (layers["attention"]["out"]["kernel"], (*blocks, "attention", "wo", "kernel")),
        (layers["mlp"]["gate"]["kernel"], (*blocks, "feed_forward", "w1", "kernel")),
        (layers["mlp"]["down"]["kernel"], (*blocks, "feed_forward", "w2", "kernel")),
        (layers["mlp"]["up"]["kernel"], (*blocks, "feed_forward", "w3", "kernel")),
        (layers["mlp_norm"]["scale"], (*blocks, "ffn_norm", "kernel")),
    ]:
        np.testing.assert_array_equal(ours.reshape(-1), fsq_weights[published].reshape(-1))


def test_stacked_and_separate_layers_import_alike(tmp_path, fsq_abstract, fsq_weights):
    path = write_stream(tmp_path / "apart", layers_apart(fsq_weights))
    assert_trees_equal(
        import_params(path, abstract_params=fsq_abstract),
        import_params(FSQ, abstract_params=fsq_abstract),
    )


def test_bfloat16_is_up_cast_exactly(tmp_path, fsq_abstract, fsq_weights):
    stored = {key: array.astype(ml_dtypes.bfloat16) for key, array in fsq_weights.items()}
    for name, weights in (("stacked", stored), ("apart", layers_apart(stored))):
        params = import_params(write_stream(tmp_path / name, weights), abstract_params=fsq_abstract)
        want = import_params(FSQ, abstract_params=fsq_abstract)
        want = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), want)
        assert_trees_equal(params, want)


def test_chunked_arrays_are_joined(tmp_path, monkeypatch, fsq_weights):
    with monkeypatch.context() as patch:
        patch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 4000)
        path = write_stream(tmp_path / "chunked", fsq_weights)
    assert b"__msgpack_chunked_array__" in path.read_bytes()
    chunked = dict(read_published_stream(path))
    assert chunked.keys() == fsq_weights.keys()
    for key in fsq_weights:
        np.testing.assert_array_equal(chunked[key], fsq_weights[key])


def test_optimizer_state_is_passed_over_unread(tmp_path, fsq_weights):
    entries = [
        msgpack.packb((("opt_state", "0", "mu"), b"never decoded" * 5_000_000)),
        msgpack.packb((("step",), b"\xc1")),
        *(
            msgpack.packb((("params", "params", *key), flax.serialization.to_bytes(value)))
            for key, value in fsq_weights.items()
        ),
    ]
    path = tmp_path / "state"
    path.write_bytes(b"".join(entries))
    del entries
    tracemalloc.start()
    found = {key for key, _ in read_published_stream(path)}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == fsq_weights.keys()
    assert peak < 8 * max(array.nbytes for array in fsq_weights.values()) + 2**20


@pytest.mark.parametrize("apart", [False, True])
def test_one_message_names_every_misfit(tmp_path, fsq_abstract, fsq_weights, apart):
    weights = layers_apart(fsq_weights) if apart else dict(fsq_weights)
    blocks = ("encoder", "encoder_blocks", "1" if apart else "scan_decoder")
    del weights["decoder", "ln_f", "kernel"], weights[*blocks, "attention", "wq", "kernel"]
    weights["encoder", "surprise"] = np.zeros(3, np.float32)
    weights["encoder", "pre_quant", "kernel"] = np.zeros((64, 16), np.float32)
    weights[*blocks, "ffn_norm", "kernel"] = np.zeros((7,), np.float32)
    with pytest.raises(UsageError) as caught:
        import_params(write_stream(tmp_path / "m", weights), abstract_params=fsq_abstract)
    message = str(caught.value)
    assert "\n" not in message
    layer, query, norm = ("[1]", "(64, 64)", "(64,)") if apart else ("", "(2, 64, 64)", "(2, 64)")
    for part in (
        "missing decoder/ln_f/kernel (64,) for decoder/norm/scale",
        f"missing {'/'.join(blocks)}/attention/wq/kernel {query} "
        f"for encoder/layers/attention/query/kernel{layer}",
        "extra encoder/surprise (3,)",
        "encoder/pre_quant/kernel has shape (64, 16), but encoder/out_proj/kernel needs (64, 6)",
        f"{'/'.join(blocks)}/ffn_norm/kernel has shape (7,), "
        f"but encoder/layers/mlp_norm/scale{layer} needs {norm}",
    ):
        assert part in message


def test_another_number_of_layers_is_named(tmp_path, fsq_abstract, fsq_weights):
    apart = layers_apart(fsq_weights)
    more = {
        tuple("2" if part == "1" else part for part in key): array for key, array in apart.items()
    }
    path = write_stream(tmp_path / "m", apart | more)
    with pytest.raises(UsageError, match="extra encoder/encoder_blocks/2/attention/wk/kernel"):
        import_params(path, abstract_params=fsq_abstract)


def test_a_weight_that_occurs_twice_is_refused(tmp_path, fsq_abstract):
    path = tmp_path / "m"
    path.write_bytes(FSQ.read_bytes() * 2)
    with pytest.raises(UsageError, match="encoder/is_kept_embed occurs twice"):
        import_params(path, abstract_params=fsq_abstract)


def test_both_layouts_in_one_file_are_refused(tmp_path, fsq_abstract, fsq_weights):
    path = write_stream(tmp_path / "m", fsq_weights | layers_apart(fsq_weights))
    with pytest.raises(UsageError, match="extra encoder/encoder_blocks/scan_decoder"):
        import_params(path, abstract_params=fsq_abstract)


def test_a_model_without_a_published_counterpart_is_refused(fsq_abstract):
    with pytest.raises(UsageError, match="encoder/bias"):
        import_params(
            FSQ,
            abstract_params=fsq_abstract
            | {"encoder": {"bias": jax.ShapeDtypeStruct((3,), np.float32)}},
        )


# Damage and hostility.


@settings(max_examples=150)
@given(cut=st.integers(0, FSQ.stat().st_size - 1))
def test_truncation_anywhere_is_a_usage_error(tmp_path_factory, fsq_abstract, cut):
    path = tmp_path_factory.mktemp("cut") / "m"
    path.write_bytes(FSQ.read_bytes()[:cut])
    with pytest.raises(UsageError, match=r"cut short|is empty|missing"):
        import_params(path, abstract_params=fsq_abstract)


@pytest.mark.parametrize("cut", range(1, 90))
def test_truncation_inside_the_first_header_is_named(tmp_path, cut):
    path = tmp_path / "m"
    path.write_bytes(FSQ.read_bytes()[:cut])
    with pytest.raises(UsageError, match=f"{path}: cut short"):
        list(read_published_stream(path))


@settings(max_examples=150)
@given(data=st.data())
def test_changed_bytes_never_crash(tmp_path_factory, fsq_abstract, data):
    damaged = bytearray(FSQ.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        near_header = st.integers(0, 120)
        at = data.draw(near_header | st.integers(0, len(damaged) - 1))
        damaged[at] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("changed") / "m"
    path.write_bytes(damaged)
    try:
        import_params(path, abstract_params=fsq_abstract)
    except UsageError as error:
        assert str(path) in str(error)


@settings(max_examples=200)
@given(garbage=st.binary(min_size=1, max_size=300))
def test_garbage_is_a_usage_error(tmp_path_factory, garbage):
    path = tmp_path_factory.mktemp("garbage") / "m"
    path.write_bytes(garbage)
    try:
        weights = list(read_published_stream(path))
    except UsageError as error:
        assert str(path) in str(error)
    else:
        assert not weights


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (array_fields((2,), "object", bytes(16)), "dtype b'object'"),
        (array_fields((2,), "O", bytes(16)), "dtype b'O'"),
        (array_fields((2,), "float32x", bytes(8)), "dtype"),
        (array_fields((2,), "int32", bytes(8)), "dtype"),
        (array_fields((2,), "f4,O", bytes(8)), "dtype"),
        (array_fields((3,), "float32", bytes(8)), "does not match 8 bytes"),
        (array_fields((2**31 - 1,) * 8, "float32", bytes(8)), "does not match"),
        (array_fields((-1,), "float32", bytes(8)), "other than sizes"),
        (array_fields((-1, -2), "float32", bytes(8)), "other than sizes"),
        (array_fields((2**64 - 1, 0), "float32", b""), "other than sizes"),
        (array_fields((1.5,), "float32", bytes(8)), "other than sizes"),
        (array_fields((True, 2), "float32", bytes(8)), "other than sizes"),
        (array_fields(2, "float32", bytes(8)), "not a short list"),
        (array_fields((2,), "float32", 8), "does not match no bytes"),
        (array_fields((2,), "float32"), "no \\(shape, dtype, data\\)"),
        (array_fields((2,), ("float32",), bytes(8)), "dtype"),
        (array_fields((1,) * 9, "float32", bytes(4)), "not a flax-serialised array"),
        (msgpack.ExtType(1, b""), "not a flax-serialised array"),
        (msgpack.ExtType(1, b"\xdd\xff\xff\xff\xff"), "not a flax-serialised array"),
        (msgpack.ExtType(1, b"\x91" * 5000), "not a flax-serialised array"),
        (msgpack.ExtType(3, b"abc"), "not an array"),
        (None, "not an array"),
        ({"a": 1}, "not a chunked array"),
        ({"__msgpack_chunked_array__": True}, "not numbered"),
        ({"__msgpack_chunked_array__": True, "shape": {"0": 2}, "chunks": {}}, "chunks"),
        (
            {
                "__msgpack_chunked_array__": True,
                "shape": {"0": 9},
                "chunks": {"0": array_fields((2,), "float32", bytes(8))},
            },
            "size of its chunks",
        ),
    ],
)
def test_hostile_arrays_are_named(tmp_path, value, reason):
    path = write_raw(tmp_path / "m", value)
    with pytest.raises(UsageError, match=reason) as caught:
        list(read_published_stream(path))
    assert str(path) in str(caught.value) and "encoder/in_proj/kernel" in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        b"\xdd\xff\xff\xff\xff",  # an array of 2^32 items
        b"\x92\xdd\xff\xff\xff\xff",
        b"\x91" * 20_000,
        b"\x92" + msgpack.packb(["a"] * 33) + b"\xc4\x00",
        b"\x92" + msgpack.packb(["a" * 20_000]) + b"\xc4\x00",
        msgpack.packb((["a", 1], b"")),
        msgpack.packb(([], b"")),
        msgpack.packb((["a\n"], b"")),
        msgpack.packb(("a", b"")),
        msgpack.packb((["a"], b"", b"")),
        msgpack.packb({"a": 1}),
        msgpack.packb((["a"], [1, 2])),
        b"PK\x03\x04 a zip",
        b"\x80\x04\x95 a pickle",
    ],
)
def test_hostile_headers_are_usage_errors(tmp_path, data):
    path = tmp_path / "m"
    path.write_bytes(data)
    with pytest.raises(UsageError, match=str(path)):
        list(read_published_stream(path))


def test_a_claimed_size_is_not_allocated(tmp_path):
    path = tmp_path / "m"
    path.write_bytes(b"\x92\x91\xa1a\xc6\xff\xff\xff\xff" + bytes(100))
    tracemalloc.start()
    with pytest.raises(UsageError, match="cut short inside a"):
        list(read_published_stream(path))
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_missing_file_is_a_usage_error(tmp_path, fsq_abstract):
    with pytest.raises(UsageError, match="no such file"):
        import_params(tmp_path / "none", abstract_params=fsq_abstract)


# The config.


def test_config_is_converted():
    assert convert_config(settings_of("vae_video"), conditioned=False) == {
        "model.width": 64,
        "compute.dtype": "float32",
        "model.mlp_width": 96,
        "model.encoder_layers": 2,
        "model.decoder_layers": 2,
        "model.heads": 2,
        "model.patch": (2, 8, 8),
        "model.bottleneck": "vae",
        "model.fsq_levels": (8, 8, 8, 5, 5, 5),
        "model.vae_dim": 8,
        "model.rope_theta": 5e6,
        "model.norm_eps": 1e-5,
        "model.conditioned": False,
        "video.frames_per_block": 4,
        "video.resolution": 32,
        "masking.min_tokens": 4,
        "data.sequence_blocks": 3,
    }


def test_config_lists_unknown_missing_and_ill_typed_keys():
    published = settings_of("fsq_image") | {
        "extra_key": 1,
        "hidden_size": "64",
        "theta": True,
        "patch_size": [1, 8],
        "scan_layers": 1,
        "max_sequence_length": 10**400,
    }
    del published["resolution"]
    with pytest.raises(UsageError) as caught:
        convert_config(published)
    for part in (
        *("unknown key extra_key", "hidden_size must be", "theta must be", "patch_size must be"),
        *("scan_layers must be", "max_sequence_length must be", "missing key resolution"),
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_toks": 24}, "max_toks is 24, but .* give 16"),
        ({"patch_size": [1, 8, 7]}, "does not divide"),
        ({"min_toks": 17}, "min_toks 17 is above"),
        ({"max_sequence_length": 50}, "not a multiple"),
        ({"theta": float("nan")}, "theta must be"),
        ({"theta": 10**400}, "theta must be"),
        ({"bottleneck_type": ["fsq"]}, "bottleneck_type must be"),
    ],
)
def test_config_that_disagrees_with_itself_is_refused(change, message):
    with pytest.raises(UsageError, match=message):
        convert_config(settings_of("fsq_image") | change)


@pytest.mark.parametrize("published", [None, [], "text"])
def test_config_must_be_an_object(published):
    with pytest.raises(UsageError, match="JSON object"):
        convert_config(published)


# The exported folder.


@pytest.mark.parametrize("case", FILES)
def test_import_writes_an_exported_folder(tmp_path, case):
    output = tmp_path / "models" / "mine"
    import_published(FILES[case], config_file=REFERENCE / case / "config.json", output=output)
    assert sorted(path.name for path in output.iterdir()) == ["config.json", "model.safetensors"]
    assert [path.name for path in output.parent.iterdir()] == ["mine"]
    config = config_lib.read_config(output / "config.json")
    assert config.model.width == 64 and config.model.conditioned
    params, metadata = load_safetensors(output / "model.safetensors")
    assert metadata["source"] == f"published {FILES[case].name}"
    assert_trees_equal(params, import_params(FILES[case], abstract_params=abstract_params(config)))


def test_a_model_without_embeds_is_unconditioned(tmp_path, fsq_weights):
    plain = {key: array for key, array in fsq_weights.items() if not key[-1].endswith("_embed")}
    (tmp_path / "empty").mkdir()
    import_published(
        write_stream(tmp_path / "m", plain),
        config_file=FSQ.parent / "config.json",
        output=tmp_path / "empty",
    )
    assert not config_lib.read_config(tmp_path / "empty" / "config.json").model.conditioned


def test_import_does_not_overwrite(tmp_path):
    (tmp_path / "mine").write_text("mine")
    for output in (tmp_path, tmp_path / "mine"):
        with pytest.raises(UsageError, match="name another"):
            import_published(FSQ, config_file=FSQ.parent / "config.json", output=output)
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 100_000, "\xff", '{"hidden_size": 1' + "0" * 5000 + "}"]
)
def test_unreadable_config_leaves_nothing_behind(tmp_path, text):
    config_file = tmp_path / "config.json"
    config_file.write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match=r"as JSON"):
        import_published(FSQ, config_file=config_file, output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == [config_file]
    with pytest.raises(UsageError, match=r"as JSON"):
        import_published(FSQ, config_file=tmp_path / "none", output=tmp_path / "out")


def test_a_misfit_leaves_nothing_behind(tmp_path):
    config_file = REFERENCE / "vae_video" / "config.json"
    with pytest.raises(UsageError, match="do not fit the config"):
        import_published(FSQ, config_file=config_file, output=tmp_path / "out")
    assert not list(tmp_path.iterdir())
