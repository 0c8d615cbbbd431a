"""Packing loses no block, leaves no gap, keeps pieces in order and cuts little."""

from collections import Counter, defaultdict

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from elastictok_jax.data.packing import PackedClip, pack_clips

SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def problems(draw):
    """Draws clips of any lengths that fill some rows exactly, and the row length."""
    row_blocks = draw(st.integers(1, 12))
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=40))
    rows = -(-sum(lengths) // row_blocks)
    lengths += [1] * (rows * row_blocks - sum(lengths))
    clips = [PackedClip(0, item, 0, 3, blocks) for item, blocks in enumerate(lengths)]
    return clips, rows, row_blocks


def pieces_by_item(packed):
    """Returns (start, blocks, row) of all pieces of each item, in row order."""
    pieces = defaultdict(list)
    for row, clips in enumerate(packed):
        for clip in clips:
            pieces[clip.item].append((clip.start, clip.blocks, row))
    return pieces


@given(problems(), SEEDS)
def test_every_block_is_placed_once_and_rows_are_full(problem, seed):
    clips, rows, row_blocks = problem
    packed = pack_clips(clips, rows=rows, row_blocks=row_blocks, rng=np.random.default_rng(seed))
    assert len(packed) == rows
    assert all(sum(clip.blocks for clip in row) == row_blocks for row in packed)
    blocks = Counter(
        (clip.item, block)
        for row in packed
        for clip in row
        for block in range(clip.start, clip.start + clip.blocks)
    )
    assert blocks == Counter((c.item, b) for c in clips for b in range(3, 3 + c.blocks))


@given(problems(), SEEDS)
def test_pieces_come_in_order_and_long_clips_fill_whole_rows(problem, seed):
    clips, rows, row_blocks = problem
    packed = pack_clips(clips, rows=rows, row_blocks=row_blocks, rng=np.random.default_rng(seed))
    for item, pieces in pieces_by_item(packed).items():
        assert pieces == sorted(pieces)  # rows ascend with the start
        assert len({row for _, _, row in pieces}) == len(pieces)
        for _, blocks, _ in pieces[: clips[item].blocks // row_blocks]:
            assert blocks == row_blocks


@given(problems(), SEEDS)
def test_the_same_seed_packs_the_same(problem, seed):
    clips, rows, row_blocks = problem
    twice = [
        pack_clips(clips, rows=rows, row_blocks=row_blocks, rng=np.random.default_rng(seed))
        for _ in range(2)
    ]
    assert twice[0] == twice[1]


def test_clips_that_fit_are_not_cut():
    """Best fit finds the pairs 5 + 3 and 6 + 2 that fill rows of 8."""
    lengths = [5, 3, 6, 2, 2, 6, 3, 5]
    clips = [PackedClip(0, item, 0, 0, blocks) for item, blocks in enumerate(lengths)]
    packed = pack_clips(clips, rows=4, row_blocks=8, rng=np.random.default_rng(0))
    assert sorted(sorted(c.blocks for c in row) for row in packed) == [[2, 6]] * 2 + [[3, 5]] * 2


def test_few_clips_are_cut_on_a_realistic_spread_of_durations():
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(np.log(5), 0.8, 4000)).astype(int).clip(1, 15).tolist()
    rows = sum(lengths) // 16
    lengths[-1] -= sum(lengths) - rows * 16
    while lengths[-1] <= 0:
        last = lengths.pop()
        lengths[-1] += last
    clips = [PackedClip(0, item, 0, 0, blocks) for item, blocks in enumerate(lengths)]
    packed = pack_clips(clips, rows=rows, row_blocks=16, rng=rng)
    cut = sum(len(pieces) > 1 for pieces in pieces_by_item(packed).values())
    assert cut / len(clips) < 0.05


def test_rows_are_shuffled():
    clips = [PackedClip(0, item, 0, 0, 1) for item in range(400)]
    packed = pack_clips(clips, rows=100, row_blocks=4, rng=np.random.default_rng(0))
    assert [clip.item for row in packed for clip in row] != list(range(400))
