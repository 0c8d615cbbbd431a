"""ElasticTokenizer on small random models and real footage."""

import gc
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastictok_jax import ElasticTokenizer, Tokens
from elastictok_jax.config import config_to_json
from elastictok_jax.errors import UsageError
from elastictok_jax.perceptual.lpips import lpips
from elastictok_jax.perceptual.lpips_weights import load_lpips
from elastictok_jax.pixels import pixels_to_float
from elastictok_jax.storage.safetensors import save_safetensors
from tests.tokenizer.small import make_tokenizer, moving_clip


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def clip():
    return moving_clip(frames=20)


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


@pytest.mark.parametrize("search", ["hybrid", "binary", "full", "binned"])
def test_a_target_that_all_tokens_reach_is_never_missed(tokenizer, clip, search):
    """Block by block, every length tried by hand with the same earlier blocks."""
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
            assert tokens.met[block] == tried[length - 1]
            assert tokens.met[block] or not tried[-1]
            if search == "full":
                assert tokens.met[block] == any(tried)
                assert not any(tried) or length == tried.index(True) + 1
            chosen.append(int(length))
        again = tokenizer.encode(clip, tokens=chosen)
        np.testing.assert_array_equal(again.mse, tokens.mse)
        assert (tokens.mse[tokens.met] <= target).all()
        assert (tokens.mse[~tokens.met] > target).all()


def test_other_measures_of_quality(tokenizer, clip):
    by_mse = tokenizer.encode(clip, max_mse=0.25)
    by_psnr = tokenizer.encode(clip, min_psnr=10 * np.log10(4 / 0.25))
    np.testing.assert_array_equal(by_psnr.lengths, by_mse.lengths)
    frames = jnp.asarray(clip[:4], jnp.float32) / 127.5 - 1
    best = tokenizer.encode(clip[:4], max_lpips=1e-6)
    params = load_lpips(tokenizer.config.loss.lpips_net)
    reached = lpips(params, pixels_to_float(tokenizer.decode(best)), frames, net="alex").mean()
    loose = tokenizer.encode(clip[:4], max_lpips=float(reached) * 1.001)
    assert not best.met.any() and loose.met.all()
    assert lpips(params, pixels_to_float(tokenizer.decode(loose)), frames, net="alex").mean() <= (
        reached * 1.002
    )


def test_a_budget_is_spent_to_the_last_token_over_all_clips(tokenizer, clip):
    clips = [clip, clip[:9], np.full_like(clip[:12], 128)]
    for tokens in (tokenizer.encode(clips, budget=0.4), tokenizer.encode(clips, total_tokens=35)):
        assert [len(t.codes) for t in tokens] == [5, 3, 3]
        assert sum(t.num_tokens for t in tokens) == 35  # 0.4 of 88
    with pytest.raises(UsageError, match="total_tokens from 11 to 88"):
        tokenizer.encode(clips, total_tokens=89)
    with pytest.raises(UsageError, match="whole number"):
        tokenizer.encode(clips, total_tokens=9.5)
    assert tokenizer.encode([], budget=0.4) == []
    alone = tokenizer.encode(clip, budget=0.5)
    assert alone.num_tokens == 20


def test_a_stream_gives_what_the_whole_clip_gives(tokenizer, clip):
    for goal in ({"tokens": 3}, {"max_mse": 0.3}):
        pieces = list(tokenizer.encode_stream([clip[0], clip[1:6], clip[6:18]], **goal))
        whole = tokenizer.encode(clip[:18], **goal)
        assert [piece.frames for piece in pieces] == [4, 4, 4, 4, 2]
        for piece, codes in zip(pieces, whole.codes, strict=True):
            np.testing.assert_array_equal(piece.codes[0], codes)
        np.testing.assert_array_equal(
            np.concatenate(list(tokenizer.decode_stream(pieces))), tokenizer.decode(whole)
        )


def test_a_stream_keeps_to_its_budget(tokenizer, clip):
    used = np.cumsum([t.num_tokens for t in tokenizer.encode_stream([clip] * 4, budget=0.5)])
    assert (used <= 4 * np.arange(1, 21) + 16 * 4).all()
    assert used[-1] <= 1.5 * 4 * 20


def test_a_stream_yields_a_block_as_soon_as_it_is_there(tokenizer, clip):
    taken = []

    def frames():
        for index, frame in enumerate(clip):
            taken.append(index)
            yield frame

    for block, _ in enumerate(tokenizer.encode_stream(frames(), tokens=2)):
        assert len(taken) == 4 * (block + 1)


@pytest.mark.parametrize(
    ("frames", "goal", "words"),
    [
        ([np.zeros((16, 16, 3), np.uint8), np.zeros((8, 16, 3), np.uint8)], {}, "give one size"),
        ([np.zeros((16, 16), np.uint8)], {}, "uint8"),
        ([np.zeros((16, 16, 3), np.uint8)], {"tokens": [1, 2]}, "one number of tokens"),
    ],
)
def test_bad_streams_are_named(tokenizer, frames, goal, words):
    with pytest.raises(UsageError, match=words):
        list(tokenizer.encode_stream(frames, **({"tokens": 2} | goal)))


def test_a_narrower_window_is_kept_in_the_tokens(clip):
    wide, narrow = make_tokenizer(), make_tokenizer()
    narrow.window_blocks = 1
    tokens = narrow.encode(clip, tokens=4)
    np.testing.assert_array_equal(wide.decode(tokens), narrow.decode(tokens))
    assert (wide.decode(tokens) != wide.decode(wide.encode(clip, tokens=4))).any()


def test_a_wider_window_than_ours_is_decoded_only_when_asked_for(clip):
    """The memory that it takes is not for a file to say."""
    wide, ours = make_tokenizer(), make_tokenizer()
    wide.window_blocks = 2**20
    tokens, short = wide.encode(clip, tokens=4), wide.encode(clip[:12], tokens=4)
    np.testing.assert_array_equal(ours.decode(short), wide.decode(short))  # 3 blocks see 3
    with pytest.raises(UsageError, match="1048576 blocks of these tokens see each other"):
        ours.decode(tokens)
    with pytest.raises(UsageError, match="--window-blocks"):
        list(ours.decode_stream(wide.encode(clip[i : i + 4], tokens=4) for i in range(0, 20, 4)))
    ours.window_blocks = 5
    np.testing.assert_array_equal(ours.decode(tokens), wide.decode(tokens))


def test_pieces_that_are_not_of_one_clip_are_not_decoded(tokenizer, clip):
    first = tokenizer.encode(clip[:4], tokens=3)
    narrow = make_tokenizer()
    narrow.window_blocks = 1
    for later, words in [
        (tokenizer.encode(clip[:4, :12], tokens=3), "piece 1 has height 12, the first 16"),
        (narrow.encode(clip[:4], tokens=3), "piece 1 has window_blocks 1, the first 3"),
    ]:
        with pytest.raises(UsageError, match=words):
            list(tokenizer.decode_stream([first, later]))
    with pytest.raises(UsageError, match="piece 1 follows one that ends within a block"):
        list(tokenizer.decode_stream([tokenizer.encode(clip[:3], tokens=3), first]))


def test_an_image_of_many_tiles_needs_the_memory_of_one(tokenizer):
    """Of keys and values: no block follows that would read them."""

    def held():
        gc.collect()
        return sum(x.nbytes for x in jax.live_arrays() if x.dtype == np.float32)

    before = held()
    encoding = tokenizer.encode_stream([np.zeros((256, 16, 3), np.uint8)], tokens=3)
    tokens = next(encoding)
    of_encoding = held() - before
    decoding = tokenizer.decode_stream([tokens])
    next(decoding)
    of_a_tile = 2 * 8 * 32 * 4  # keys and values of 8 tokens of width 32 in one layer
    assert of_encoding <= 2 * of_a_tile  # encoder and decoder
    assert held() - before - of_encoding <= of_a_tile
    assert len(tokens.codes) == 16
    assert [*encoding, *decoding] == []  # both were still there


@pytest.mark.slow
def test_memory_is_flat_over_20000_frames(tokenizer):
    import psutil

    process, held = psutil.Process(), []
    rng = np.random.default_rng(0)

    def frames():
        for index in range(20_000):
            if index % 1000 == 0:
                held.append(process.memory_info().rss)
            yield rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)

    pieces = tokenizer.encode_stream(frames(), max_mse=0.5)
    decoded = sum(len(some) for some in tokenizer.decode_stream(pieces))
    assert decoded == 20_000
    assert max(held[2:]) - held[2] < 8 * 2**20, np.diff(held)


def test_a_search_stays_within_the_lengths_trained(clip):
    tokenizer = make_tokenizer(**{"masking.min_tokens": 3})
    tokens = tokenizer.encode(clip, max_mse=4.0, search="full")
    assert tokens.met.all()
    assert tokens.lengths.tolist() == [3] * 5


def test_execution_settings_are_no_part_of_the_fingerprint(tokenizer, clip):
    other = make_tokenizer(**{"compute.attention": "dense", "compute.remat": "full"})
    assert other.fingerprint == tokenizer.fingerprint
    assert other.decode(tokenizer.encode(clip, tokens=2)).shape == clip.shape


def test_unreachable_targets_are_reported(tokenizer, clip):
    """With the length whose error is least."""
    errors = [tokenizer.encode(clip[:4], tokens=n).mse[0] for n in range(1, 9)]
    tokens = tokenizer.encode(clip[:4], max_mse=1e-9, search="full")
    assert not tokens.met.any()
    assert tokens.lengths.tolist() == [1 + int(np.argmin(errors))]


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
        ({}, "exactly one of tokens, .* given: none"),
        ({"tokens": 3, "max_mse": 0.1}, "given: tokens, max_mse"),
        ({"max_mse": -1.0}, "a number above 0"),
        ({"max_mse": float("nan")}, "a number above 0"),
        ({"budget": 1.5}, r"in \(0, 1\]"),
        ({"tokens": 9}, "from 1 to 8"),
        ({"tokens": 0}, "from 1 to 8"),
        ({"tokens": 2.5}, "whole numbers"),
        ({"tokens": [1, 2]}, "2 lengths for 5 blocks"),
        ({"max_mse": 0.1, "search": "magic"}, "one of hybrid, full"),
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
    (tmp_path / "config.json").write_text(config_to_json(tokenizer.config))
    save_safetensors(tmp_path / "model.safetensors", jax.device_get(tokenizer.params), metadata={})
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


def test_decibels_beyond_any_picture_are_refused(tokenizer, clip):
    with pytest.raises(UsageError, match="min_psnr=4000"):
        tokenizer.encode(clip, min_psnr=4000)
