"""Clips measured on several devices at once are measured as on one."""

import jax
import numpy as np
import pytest

from elastictok_jax.evaluation.clip_metrics import ClipMetrics
from elastictok_jax.evaluation.eval_clips import EvalClip
from elastictok_jax.evaluation.measure import measurement_plan
from elastictok_jax.evaluation.measurement_store import measure_with_store
from tests.tokenizer.small import make_tokenizer

JUDGE = ClipMetrics("none", lambda original, decoded: {}, None)


def clip(index):
    pixels = np.random.default_rng(index).integers(0, 255, (4 + 4 * (index % 2), 16, 16, 3))
    return EvalClip(f"clip{index}", pixels.astype(np.uint8), 24.0)


def measure(tokenizers, clips, folder, devices):
    folder.mkdir()
    plan = measurement_plan(tokenizers[0], tokenizers[0].config.evaluation)
    said = []
    records = measure_with_store(
        *(tokenizers, clips, plan, JUDGE),
        folder=folder,
        devices=devices,
        progress=lambda done, total: said.append((done, total)),
    )
    assert said == [(done, len(tokenizers) * len(clips)) for done in range(len(said))]
    return records


def test_devices_share_the_clips(tmp_path):
    tokenizers = [make_tokenizer(), make_tokenizer(seed=1)]
    clips = [clip(index) for index in range(4)]
    # Two: each compiles for itself.
    many = measure(tokenizers, clips, tmp_path / "many", jax.local_devices()[:2])
    assert len(list((tmp_path / "many").glob("*.npz"))) == 8
    one = measure(tokenizers, clips, tmp_path / "one", jax.local_devices()[:1])
    for ours, theirs in zip(many, one, strict=True):
        assert list(ours) == list(theirs) == [c.name for c in clips]
        for name, record in ours.items():
            assert record.keys() == theirs[name].keys()
            for key, value in record.items():
                if not key.endswith("seconds"):
                    np.testing.assert_array_equal(value, theirs[name][key], err_msg=key)


def test_what_one_device_raises_ends_them_all(tmp_path):
    clips = [clip(index) for index in range(3)]
    clips[1] = EvalClip("broken", np.zeros((4, 40, 40), np.uint8), 24.0)
    with pytest.raises(Exception, match=r"."):
        measure([make_tokenizer()], clips, tmp_path / "many", jax.local_devices()[:2])
