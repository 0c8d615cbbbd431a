"""Held-out figures during training: thresholds by hand, and which checkpoint counts as best."""

import numpy as np
import pytest

from elastictok_jax.errors import UsageError
from elastictok_jax.experiment_registry import get_experiment
from elastictok_jax.models.rate_points import tokens_at_targets
from elastictok_jax.storage.checkpoint import BestMetric, Checkpointer
from elastictok_jax.training.evaluator import require_best_metric
from tests.tiny import made_up_state, task_of


def test_thresholds_by_hand():
    """Three blocks and one of padding, with 8, 4 and 2 tokens."""
    errors = np.array([[0.1, 0.2, 0.5, np.nan], [0.2, 0.15, 0.6, np.nan], [0.3, 0.4, 0.7, np.nan]])
    results = tokens_at_targets(errors, np.array([8, 4, 2]), targets=(0.1, 0.2, 0.45))
    assert results == {
        "met_at_mse_0.1": pytest.approx(1 / 3),
        "tokens_at_mse_0.1": pytest.approx((8 + 8 + 8) / 3),
        "met_at_mse_0.2": pytest.approx(2 / 3),
        "tokens_at_mse_0.2": pytest.approx((4 + 4 + 8) / 3),
        "met_at_mse_0.45": pytest.approx(2 / 3),
        "tokens_at_mse_0.45": pytest.approx((2 + 2 + 8) / 3),
    }


@pytest.mark.parametrize(
    ("metric", "values", "kept"),
    [
        ("eval/mse", [0.3, 0.1, 0.2, 0.4], {2, 4}),
        ("eval/met_at_mse_0.1", [0.3, 0.9, 0.2, 0.4], {2, 4}),
        ("eval/tokens_at_mse_0.1", [20, 40, 60, 30], {1, 4}),
    ],
)
def test_the_best_checkpoint_is_kept(tmp_path, metric, values, kept):
    config = get_experiment("quickstart")
    config.model.width = config.model.mlp_width = 8
    config.model.encoder_layers = config.model.decoder_layers = 1
    state = made_up_state(config)
    options = dict(keep_last=1, keep_best=1, best=BestMetric(metric, lower="met" not in metric))
    checkpoints = Checkpointer(tmp_path, **options)
    for step, value in enumerate(values, start=1):
        if step == 3:  # a resumed run knows what was measured before
            checkpoints.close()
            checkpoints = Checkpointer(tmp_path, **options)
        checkpoints.save(
            step, state, data_position={}, config=config, metrics={metric: float(value)}
        )
    checkpoints.save(5, state, data_position={}, config=config, metrics=None)
    checkpoints.close()
    steps = {int(path.name) for path in (tmp_path / "checkpoints").iterdir()}
    assert steps == (kept - {4}) | {5}


def test_a_best_metric_that_no_evaluation_has_is_refused():
    config = get_experiment("quickstart")
    for name in ("eval/mse", "eval/mse_at_0.25", "eval/met_at_mse_0.06", "eval/tokens_at_mse_0.1"):
        config.train.best_metric = name
        require_best_metric(task_of(config), config)
    for name in ("eval/met_at_mse_0.05", "eval/codebook_usage", "loss", ""):
        config.train.best_metric = name
        with pytest.raises(UsageError, match=r"choose one of eval/mse, eval/mse_at_0\.5,"):
            require_best_metric(task_of(config), config)


def test_a_fixed_tokenizer_is_evaluated_at_its_own_length():
    config = get_experiment("study_fixed:share=0.25")
    assert task_of(config).points == (0.25,)
    config.train.best_metric = "eval/mse_at_0.5"
    with pytest.raises(UsageError):
        require_best_metric(task_of(config), config)
