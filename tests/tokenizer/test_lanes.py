"""A frame of many tiles takes the memory of one: the caches of the others are on the disk."""

import gc

import jax
import numpy as np
import pytest

from elastictok_jax.tokenizer.api import ElasticTokenizer
from elastictok_jax.tokenizer.tiling import TileGrid
from elastictok_jax.tokenizer.tokens import Tokens
from tests.tokenizer.small import SIDE, make_tokenizer, moving_clip

FRAMES = 22  # five blocks and a half: more than a window, and the last is not full


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def clip(tiles):
    """Tiles that differ, side by side."""
    return np.concatenate([np.roll(moving_clip(frames=FRAMES), k, axis=1) for k in range(tiles)], 2)


def test_memory_does_not_grow_with_the_number_of_tiles(tokenizer, monkeypatch):
    held = []

    def watched(run):
        def call(*args):
            gc.collect()
            held.append(sum(array.nbytes for array in jax.live_arrays()))
            return run(*args)

        return call

    for half in ("_encode", "_decode"):
        codec = tokenizer.codec
        monkeypatch.setitem(codec.__dict__, half, watched(getattr(codec, half)))
    most = {}
    gc.collect()
    gc.freeze()  # a collection then looks only at what this test makes, not at all of jax
    try:
        for tiles in (1, 3, 6):
            held.clear()
            tokens = Tokens.join(list(tokenizer.encode_stream(clip(tiles), tokens=4)))
            encoding = max(held)
            held.clear()
            for _ in tokenizer.decode_stream([tokens]):
                pass
            most[tiles] = encoding, max(held)
    finally:
        gc.unfreeze()
    params = sum(leaf.nbytes for leaf in jax.tree.leaves(tokenizer.params))
    for step in (0, 1):
        caches = most[1][step] - params
        assert caches > 0
        assert most[6][step] <= most[3][step] + 0.02 * caches
        assert most[6][step] <= most[1][step] + 0.25 * caches


@pytest.mark.parametrize("goal", [{"tokens": 3}, {"max_mse": 0.05}])
def test_tiles_in_a_stream_are_coded_as_those_of_a_whole_clip(tokenizer, goal):
    video = clip(3)
    streamed = Tokens.join(list(tokenizer.encode_stream(video, **goal)))
    whole = tokenizer.encode(video, **goal)
    assert streamed.lengths.tolist() == whole.lengths.tolist()
    for ours, theirs in zip(streamed.codes, whole.codes, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(streamed.mse, whole.mse)
    alone = make_alone(tokenizer, video, goal)
    np.testing.assert_array_equal(tokenizer.decode(streamed), alone)


def make_alone(tokenizer: ElasticTokenizer, video, goal):
    """The clip of tiles that are each coded and decoded as a clip of their own."""
    parts = [video[:, :, left : left + SIDE] for left in range(0, video.shape[2], SIDE)]
    return np.concatenate([tokenizer.decode(tokenizer.encode(p, **goal)) for p in parts], axis=2)


def test_a_tile_is_cut_alone_as_with_the_others(tokenizer):
    video = np.pad(clip(2), ((0, 0), (0, 5), (0, 3), (0, 0)), mode="reflect")
    grid = TileGrid(video.shape[:3], tokenizer.geometry)
    blocks, inside = grid.cut(video)
    for tile in range(grid.tiles):
        alone = grid.cut_tile(video, tile)
        np.testing.assert_array_equal(alone[0], blocks[tile])
        np.testing.assert_array_equal(alone[1], inside[tile])
