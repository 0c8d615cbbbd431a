"""Figures of an evaluation: laws, and small cases worked out by hand."""

import numpy as np
import pytest

from elastictok_jax.evaluation.measure import MeasurementPlan, measure_block_energy
from elastictok_jax.evaluation.summary import Measured, summarise_token_use

PLAN = MeasurementPlan(targets=(0.1,), contexts=(1,), main_target=0.1, search_blocks=0)


def test_ratio_at_an_equal_share():
    """A fixed tokenizer of 32 tokens brings half of the blocks to the target; the elastic one
    does so with 8 and 12 tokens, and the least, 4, for the other two."""
    met, lengths = [True, True, True, False], [8, 12, 40, 64]
    records = {"clip": {"target/0.1/lengths": np.array(lengths), "target/0.1/met": np.array(met)}}
    elastic = Measured("elastic", {"min_tokens": 4, "fixed_tokens": None}, records)
    half = {"clip": {"target/0.1/met": np.array([True, False, True, False])}}
    fixed = Measured("fixed", {"fixed_tokens": 32}, half)
    [row] = summarise_token_use(elastic, [fixed], {"clip": "videos"}, PLAN)
    assert row["met_share"] == 0.5
    assert row["elastic_tokens"] == pytest.approx((8 + 12 + 4 + 4) / 4)
    assert row["ratio"] == pytest.approx(32 / 7)
    assert row["ratio_missed_alike"] == pytest.approx(32 / ((8 + 12 + 32 + 32) / 4))
    every = {"clip": {"target/0.1/met": np.ones(4, bool)}}
    [row] = summarise_token_use(
        elastic, [Measured("fixed", {"fixed_tokens": 32}, every)], {"clip": "videos"}, PLAN
    )
    assert row["ratio"] is row["ratio_missed_alike"] is None  # it cannot
    none = {"clip": {"target/0.1/met": np.zeros(4, bool)}}
    [row] = summarise_token_use(
        elastic, [Measured("fixed", {"fixed_tokens": 32}, none)], {"clip": "videos"}, PLAN
    )
    assert (row["met_share"], row["ratio"]) == (0, None)  # to bring none there takes no skill


def test_high_frequency_energy():
    flat = np.full((4, 16, 16, 3), 90, np.uint8)
    board = np.where(np.indices((16, 16)).sum(axis=0) % 2, 255, 0).astype(np.uint8)
    board = np.broadcast_to(board[None, :, :, None], (4, 16, 16, 3))
    ramp = np.broadcast_to(np.arange(16, dtype=np.uint8)[None, None, :, None], (4, 16, 16, 3))
    energy = measure_block_energy(
        np.concatenate([flat, board, ramp, board[:2]]), frames_per_block=4
    )
    assert energy[0] == pytest.approx(0, abs=1e-12)
    assert energy[1] == pytest.approx(1.0) == energy[3]  # +1 and -1: all of it at the highest
    assert 0 < energy[2] < 0.01
