"""ElasticTokenizer on small random models and real footage."""

import json

import jax
import numpy as np
import pytest

from elastictok_jax import ElasticTokenizer, Tokens
from elastictok_jax.attention.api import TokenPlaces
from elastictok_jax.config import block_tokens, default_config, override, resolve, to_json
from elastictok_jax.data import media
from elastictok_jax.data.sources import EMBEDDED
from elastictok_jax.errors import UsageError
from elastictok_jax.masking import keep_mask
from elastictok_jax.models.elastictok import build_model
from elastictok_jax.models.patching import patchify, to_float, to_uint8
from elastictok_jax.training.state import init_state
from elastictok_jax.weights.safetensors import save_params

SMALL = {
    **{"model.width": 32, "model.mlp_width": 48, "model.heads": 2, "model.dtype": "float32"},
    **{"model.encoder_layers": 1, "model.decoder_layers": 1, "model.patch": (2, 8, 8)},
    **{"video.resolution": 16, "masking.min_tokens": 1, "data.sequence_blocks": 3},
}  # 8 tokens a block


def make_tokenizer(**overrides):
    config = default_config()
    override(config, SMALL | overrides)
    config = resolve(config)
    return ElasticTokenizer(config, init_state(config).params)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def clip():
    frames = media.read_frames(EMBEDDED / "heldout" / "bbb_stream.mp4", count=20)
    return media.center_crop(media.resize_shortest(frames, side=16), height=16, width=16)


def test_fixed_lengths_are_kept_exactly(tokenizer, clip):
    tokens = tokenizer.encode(clip, tokens=5)
    assert tokens.lengths.tolist() == [5] * 5
    assert [len(code) for code in tokens.codes] == [5] * 5
    assert tokenizer.encode(clip, tokens=[1, 8, 3, 2, 7]).lengths.tolist() == [1, 8, 3, 2, 7]
    assert tokens.codes[0].dtype == np.int32
    assert tokens.met.all()


@pytest.mark.parametrize("bottleneck", ["fsq", "vae"])
@pytest.mark.parametrize("conditioned", [True, False])
def test_reported_error_is_that_of_the_decoded_file(tmp_path, clip, bottleneck, conditioned):
    tokenizer = make_tokenizer(**{"model.bottleneck": bottleneck, "model.conditioned": conditioned})
    tokens = tokenizer.encode(clip, tokens=[8, 2, 5, 1, 3])
    tokens.save(tmp_path / "clip.etok")
    decoded = tokenizer.decode(Tokens.load(tmp_path / "clip.etok"))
    assert decoded.shape == clip.shape
    assert decoded.dtype == np.uint8
    error = ((decoded.astype(np.float64) - clip) / 127.5).reshape(5, -1)
    np.testing.assert_allclose((error**2).mean(axis=1), tokens.mse, rtol=1e-5)


def test_window_equals_a_forward_pass_over_the_whole_clip(tokenizer, clip):
    """While the window covers the clip, blocks see just what they saw in training."""
    lengths = [8, 2, 5]
    tokens = tokenizer.encode(clip[:12], tokens=lengths)
    config = tokenizer.config
    model, per_block = build_model(config), block_tokens(config)
    patches = patchify(clip[:12], patch=(2, 8, 8), frames_per_block=4)
    places = TokenPlaces(np.arange(24), np.ones((1, 24), np.int32), per_block)
    keep = keep_mask(np.asarray([lengths]), tokens_per_block=per_block)
    output = model.apply({"params": tokenizer.params}, to_float(patches[None]), keep, places)
    codes = np.asarray(output.codes)[0].reshape(3, per_block)
    for block, length in enumerate(lengths):
        np.testing.assert_array_equal(codes[block, :length], tokens.codes[block])
    error = np.asarray((to_float(to_uint8(output.reconstruction)) - to_float(patches)) ** 2)
    np.testing.assert_allclose(error.reshape(3, -1).mean(axis=1), tokens.mse, rtol=1e-5)


@pytest.mark.parametrize("search", ["binary", "full"])
def test_a_reachable_target_is_never_missed(tokenizer, clip, search):
    """Against every length tried by hand, block by block, with the same earlier blocks."""
    errors = [tokenizer.encode(clip[:4], tokens=n).mse[0] for n in range(1, 9)]
    for target in np.quantile(errors, [0.0, 0.3, 0.7, 1.0]):
        tokens = tokenizer.encode(clip, max_mse=float(target), search=search)
        chosen: list[int] = []
        for block, length in enumerate(tokens.lengths):
            upto = clip[: 4 * (block + 1)]
            tried = [
                tokenizer.encode(upto, tokens=[*chosen, n]).mse[block] <= target
                for n in range(1, 9)
            ]
            assert tokens.met[block] == any(tried)
            if any(tried):
                assert tried[length - 1]
            if search == "full" and any(tried):
                assert length == tried.index(True) + 1
            chosen.append(int(length))
        again = tokenizer.encode(clip, tokens=chosen)
        np.testing.assert_array_equal(again.mse, tokens.mse)
        assert (tokens.mse[tokens.met] <= target).all()
        assert (tokens.mse[~tokens.met] > target).all()


def test_a_search_stays_within_the_lengths_trained(clip):
    tokenizer = make_tokenizer(**{"masking.min_tokens": 3})
    tokens = tokenizer.encode(clip, max_mse=4.0, search="full")
    assert tokens.met.all()
    assert tokens.lengths.tolist() == [3] * 5


def test_execution_settings_are_no_part_of_the_fingerprint(tokenizer, clip):
    other = make_tokenizer(**{"model.attention": "dense", "model.remat": "full"})
    assert other.fingerprint == tokenizer.fingerprint
    assert other.decode(tokenizer.encode(clip, tokens=2)).shape == clip.shape


def test_unreachable_targets_are_reported(tokenizer, clip):
    tokens = tokenizer.encode(clip[:4], max_mse=1e-9)
    assert not tokens.met.any()
    assert tokens.lengths.tolist() == [8]


@pytest.mark.parametrize("size", [(1, 16, 16), (3, 7, 5), (5, 20, 33), (8, 32, 16), (9, 1, 1)])
def test_any_size_comes_back_at_its_size(tokenizer, size):
    video = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    tokens = tokenizer.encode(video, tokens=4, fps=30.0)
    tiles = -(-size[1] // 16) * -(-size[2] // 16)
    assert len(tokens.codes) == -(-size[0] // 4) * tiles
    assert tokenizer.decode(tokens).shape == video.shape


def test_tiles_are_coded_each_on_its_own(tokenizer, clip):
    """Two tiles side by side give the blocks of both clips, time first."""
    other = clip[::-1, :, ::-1].copy()
    wide = tokenizer.encode(np.concatenate([clip, other], axis=2), tokens=6)
    left, right = tokenizer.encode(clip, tokens=6), tokenizer.encode(other, tokens=6)
    for block in range(5):
        np.testing.assert_array_equal(wide.codes[2 * block], left.codes[block])
        np.testing.assert_array_equal(wide.codes[2 * block + 1], right.codes[block])
    joined = tokenizer.decode(wide)
    np.testing.assert_array_equal(joined[:, :, :16], tokenizer.decode(left))
    np.testing.assert_array_equal(joined[:, :, 16:], tokenizer.decode(right))


def test_lists_batches_and_images(tokenizer, clip):
    results = tokenizer.encode([clip, clip[0]], tokens=3)
    assert [t.frames for t in results] == [20, 1]
    batch = tokenizer.encode(np.stack([clip, clip]), tokens=3)
    assert len(batch) == 2
    np.testing.assert_array_equal(batch[0].codes[0], results[0].codes[0])


def test_later_blocks_do_not_change_earlier_ones(tokenizer, clip):
    changed = clip.copy()
    changed[8:] = 255 - changed[8:]
    a, b = tokenizer.encode(clip, max_mse=0.5), tokenizer.encode(changed, max_mse=0.5)
    np.testing.assert_array_equal(a.lengths[:2], b.lengths[:2])
    np.testing.assert_array_equal(tokenizer.decode(a)[:8], tokenizer.decode(b)[:8])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "either tokens= or max_mse="),
        ({"tokens": 3, "max_mse": 0.1}, "not both"),
        ({"tokens": 9}, "from 1 to 8"),
        ({"tokens": 0}, "from 1 to 8"),
        ({"tokens": 2.5}, "whole numbers"),
        ({"tokens": [1, 2]}, "2 lengths for 5 blocks"),
        ({"max_mse": 0.1, "search": "magic"}, "binary, full"),
    ],
)
def test_bad_options_are_named(tokenizer, clip, arguments, words):
    with pytest.raises(UsageError, match=words):
        tokenizer.encode(clip, **arguments)


@pytest.mark.parametrize(
    "video",
    [np.zeros((4, 16, 16), np.uint8), np.zeros((4, 16, 16, 3)), np.zeros((0, 16, 16, 3), np.uint8)],
)
def test_bad_videos_are_named(tokenizer, video):
    with pytest.raises(UsageError, match="uint8"):
        tokenizer.encode(video, tokens=1)


def test_tokens_of_another_model_and_bad_codes_are_refused(tokenizer, clip):
    tokens = tokenizer.encode(clip, tokens=2)
    with pytest.raises(UsageError, match="decode with the model that encoded them"):
        make_tokenizer(seed=1).decode(tokens)
    for code in (-1, 64_000):
        bad = tokenizer.encode(clip, tokens=2)
        bad.codes[1][0] = code
        with pytest.raises(UsageError, match="codes must lie in"):
            tokenizer.decode(bad)
    bad = tokenizer.encode(clip, tokens=2)
    bad.codes.pop()
    with pytest.raises(UsageError, match="4 blocks of tokens for a clip of 5"):
        tokenizer.decode(bad)


def test_from_pretrained_reads_an_exported_folder(tokenizer, clip, tmp_path):
    (tmp_path / "config.json").write_text(to_json(tokenizer.config))
    save_params(tmp_path / "model.safetensors", jax.device_get(tokenizer.params), metadata={})
    loaded = ElasticTokenizer.from_pretrained(tmp_path)
    assert loaded.fingerprint == tokenizer.fingerprint
    np.testing.assert_array_equal(
        loaded.decode(tokenizer.encode(clip, tokens=4)),
        tokenizer.decode(loaded.encode(clip, tokens=4)),
    )
    changed = json.loads((tmp_path / "config.json").read_text())
    changed["model"]["width"] = 64
    (tmp_path / "config.json").write_text(json.dumps(changed))
    with pytest.raises(UsageError, match=r"encoder/norm/scale: \(32,\) saved, \(64,\) asked for"):
        ElasticTokenizer.from_pretrained(tmp_path)


def test_each_program_compiles_once(clip):
    tokenizer = make_tokenizer(seed=3)
    tokenizer.decode(tokenizer.encode(clip, max_mse=0.4))
    tokenizer.encode(clip, tokens=[1, 2, 3, 4, 5])
    assert tokenizer._encode_block._cache_size() == 1
    assert tokenizer._decode_block._cache_size() == 1
