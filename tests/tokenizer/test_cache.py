"""Blocks coded one at a time with a cache, against whole forward passes."""

import jax
import numpy as np
import pytest

from elastictok_jax.layers.attention.api import SequenceLayout
from elastictok_jax.layers.patching import patchify
from elastictok_jax.masking import keep_mask
from elastictok_jax.models.elastictok.codec import Past
from elastictok_jax.pixels import pixels_to_float, pixels_to_uint8
from elastictok_jax.tokenizer.block_codec import CANDIDATES, ClipDecoder, ClipEncoder
from elastictok_jax.tokenizer.tiling import TileGrid
from tests.tokenizer.small import LENGTH, make_tokenizer, moving_clip

BLOCKS = 5


@pytest.fixture(scope="module")
def clip():
    return moving_clip(frames=4 * BLOCKS)


def whole_pass(tokenizer, clip, lengths):
    """Codes [N, L, ...] and pixels [N, L, D] of one forward pass over all blocks."""
    blocks = len(lengths)
    patches = patchify(clip[: 4 * blocks], patch=(2, 8, 8), frames_per_block=4)
    tokens = blocks * LENGTH
    places = SequenceLayout(np.arange(tokens), np.ones((1, tokens), np.int32), LENGTH)
    keep = keep_mask(np.asarray([lengths]), tokens_per_block=LENGTH)
    apply = jax.jit(
        lambda params, pixels: tokenizer.codec.model.apply(params, pixels, keep, places)
    )
    output = apply({"params": tokenizer.params}, pixels_to_float(patches[None]))
    codes = np.asarray(output.codes)[0].reshape(blocks, LENGTH, *output.codes.shape[2:])
    return codes, np.asarray(output.reconstruction)[0].reshape(blocks, LENGTH, -1)


@pytest.mark.parametrize(
    ("bottleneck", "conditioned", "scan_layers", "lengths"),
    [
        ("fsq", True, True, (8, 2, 5, 1, 7)),
        ("fsq", False, False, (8, 1, 5)),
        ("vae", True, False, (8, 1, 5)),
        ("vae", False, True, (2, 8, 7)),
    ],
)
def test_streaming_equals_a_whole_pass_while_the_window_covers_it(
    clip, bottleneck, conditioned, scan_layers, lengths
):
    blocks = len(lengths)
    clip = clip[: 4 * blocks]
    tokenizer = make_tokenizer(
        **{"model.bottleneck": bottleneck, "model.conditioned": conditioned},
        **{"compute.scan_layers": scan_layers, "data.sequence_blocks": blocks},
        **{"model.encoder_layers": 2, "model.decoder_layers": 2},
    )
    tokens = tokenizer.encode(clip, tokens=list(lengths))
    codes, pixels = whole_pass(tokenizer, clip, lengths)
    decoded = patchify(tokenizer.decode(tokens), patch=(2, 8, 8), frames_per_block=4)
    for block, length in enumerate(lengths):
        if bottleneck == "fsq":
            np.testing.assert_array_equal(codes[block, :length], tokens.codes[block])
        else:
            np.testing.assert_allclose(codes[block, :length], tokens.codes[block], atol=1e-4)
    np.testing.assert_allclose(
        pixels_to_float(decoded.reshape(pixels.shape)),
        pixels_to_float(pixels_to_uint8(pixels)),
        atol=1.01 / 127.5,
    )  # a rounding may fall to the other side
    original = pixels_to_float(patchify(clip, patch=(2, 8, 8), frames_per_block=4)).reshape(
        pixels.shape
    )
    error = np.mean((pixels_to_float(pixels_to_uint8(pixels)) - original) ** 2, axis=(1, 2))
    np.testing.assert_allclose(tokens.mse, error, rtol=1e-4)


def test_several_candidates_measure_what_one_does(clip):
    tokenizer = make_tokenizer()
    coder = ClipEncoder(tokenizer._compiled, window_blocks=3)
    for frames, inside in blocks_of(tokenizer, clip):
        block = coder.block(frames, inside)
        many = block.errors(range(1, LENGTH + 1))
        one = [block.errors([length])[0] for length in range(1, LENGTH + 1)]
        np.testing.assert_allclose(many, one, rtol=1e-5)
        assert block.evaluations == 2 * LENGTH
        block.keep(3)


def blocks_of(tokenizer, clip):
    blocks, inside = TileGrid(clip.shape[:3], tokenizer.geometry).cut(clip)
    return zip(blocks[0], inside[0], strict=True)


@pytest.mark.parametrize("window", [1, 3])
def test_a_block_sees_the_window_and_no_more(clip, window):
    """With one layer nothing comes through by way of others, so a clip that starts at the first
    block of the window gives the same."""
    tokenizer = make_tokenizer()
    blocks = list(blocks_of(tokenizer, clip))
    stream = ClipEncoder(tokenizer._compiled, window_blocks=window)
    for index, newest in enumerate(blocks):
        short = ClipEncoder(tokenizer._compiled, window_blocks=BLOCKS)
        for earlier in blocks[max(0, index + 1 - window) : index]:
            short.block(*earlier).keep(4)
        block = stream.block(*newest)
        assert block.errors([6]) == pytest.approx(short.block(*newest).errors([6]), rel=1e-4)
        block.keep(4)


def held(past):
    """Tokens that a cache has room for."""
    return max((leaf.shape[-2] for leaf in jax.tree.leaves(past.kv)), default=0)


def test_memory_stays_that_of_the_window(clip):
    tokenizer = make_tokenizer(**{"data.sequence_blocks": 3})
    decoder = ClipDecoder(tokenizer._compiled, window_blocks=3)
    sizes = []
    for _ in range(9):
        decoder.block(np.zeros(2, np.int32))
        sizes.append(held(decoder.pasts))
    assert sizes == [LENGTH] + [2 * LENGTH] * 8


def test_a_cache_grows_by_doubling():
    tokenizer = make_tokenizer()
    decoder = ClipDecoder(tokenizer._compiled, window_blocks=12)
    sizes = []
    for _ in range(14):
        decoder.block(np.zeros(2, np.int32))
        sizes.append(held(decoder.pasts) // LENGTH)
    assert sizes == [1, 2, 4, 4, 8, 8, 8, 8, 11, 11, 11, 11, 11, 11]


def test_positions_wrap_without_a_seam():
    """Only distances matter, also where a 32-bit count of tokens starts again."""
    tokenizer = make_tokenizer(**{"data.sequence_blocks": 4})
    seam = 2**32 // LENGTH
    results = []
    codec = tokenizer.codec
    for start in (0, seam - 2):  # multiples of 3, so that the ring's next slot is the first
        past = Past({}, start, window=4)
        for value in range(4):
            codes, keep = np.full((1, LENGTH), 9999 * value, np.int32), np.ones((1, LENGTH), bool)
            out, present = codec.decode(tokenizer.params, codes, keep, past, jax.random.key(0))
            results.append(np.asarray(out).astype(int))
            past = codec.extend(past, present)
        assert past.blocks * LENGTH > 2**32 or not start
    assert np.abs(np.subtract(results[:4], results[4:])).max() <= 1


def test_there_is_one_program_for_each_size_of_the_cache(clip):
    tokenizer = make_tokenizer(**{"data.sequence_blocks": 4})
    for length in (1, 4, 8):
        tokenizer.decode(tokenizer.encode(clip, tokens=length))
    tokenizer.encode(clip[:9], tokens=[1, 2, 3])
    tokenizer.encode(clip, max_mse=0.3)
    sizes = 4  # of 0, 1, 2 and 3 blocks
    assert tokenizer.codec._decode._cache_size() == sizes
    assert tokenizer.codec._encode._cache_size() == sizes
    tokenizer.encode(clip, max_mse=0.3, search="full")
    assert CANDIDATES >= LENGTH  # so one more shape
    assert tokenizer.codec._encode._cache_size() == 2 * sizes
