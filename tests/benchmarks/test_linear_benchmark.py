"""The linear references: ideal code lengths, budgets that are kept, and a small run."""

import json

import numpy as np
import pytest

from benchmarks import linear


@pytest.mark.parametrize("rounding", [0.5, 1 / 3])
def test_code_lengths_are_those_of_a_distribution(rounding):
    scales = np.array([0.05, 0.7, 9.0])
    steps = np.repeat(np.arange(-400, 401)[:, None], 3, axis=1)
    total = np.sum(2.0 ** -linear.laplace_bits(steps, scales, rounding), axis=0)
    np.testing.assert_allclose(total, 1.0, atol=1e-6)


@pytest.mark.parametrize("rounding", [0.5, 1 / 3])
def test_the_centroid_is_the_mean_of_a_step(rounding):
    x = np.random.default_rng(0).exponential(0.8, size=1_000_000)
    inside = x[np.floor(x + rounding) == 2]
    assert 2 + linear.centroid(np.array(0.8), rounding) == pytest.approx(inside.mean(), abs=5e-3)


def test_bits_are_within_the_budget_and_nearly_spent():
    rng = np.random.default_rng(1)
    train, test = (rng.laplace(size=(500, 40)) * 0.9 ** np.arange(40) for _ in range(2))
    errors = []
    for bits in (20.0, 60.0, 120.0):
        decoded, used = linear.at_bits(train, test, bits=bits, rounding=1 / 3)
        assert 0.98 * bits < used <= bits
        errors.append(np.mean((decoded - test) ** 2))
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize(("finest", "coarsest"), [(0, 51), (95, 1)])
def test_the_finest_setting_within_the_budget(finest, coarsest):
    for answer in (finest, coarsest, 30):

        def size(setting, answer=answer):
            return 100 + abs(setting - finest) * -1 + abs(answer - finest)

        found = linear.coarsest_within(size, finest=finest, coarsest=coarsest, most=100)
        assert found == answer


def test_codecs_keep_within_their_bytes():
    coarse = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    clip = coarse.repeat(4, axis=1).repeat(4, axis=2)
    for measured in (
        lambda most: linear.codec_mse([clip], codec="libx264", bytes_per_frame=most),
        lambda most: linear.jpeg_mse([clip], bytes_per_frame=most),
    ):
        few, many = measured(200.0), measured(600.0)
        assert many < few < 0.5 and measured(0.5) is None


def test_small_run(tmp_path, capsys):
    out, picture = tmp_path / "linear.json", tmp_path / "linear.png"
    linear.main(
        [
            *("quickstart", "--train-batches", "12", "--json", str(out), "--plot", str(picture)),
            *("--codecs", "jpeg"),
            *("--config.evaluation.batches=1", "--config.video.resolution=32"),
        ]
    )
    rows = json.loads(out.read_text())["rows"]
    assert "| tokens |" in capsys.readouterr().out and picture.stat().st_size > 1000
    for row in rows:
        # Precision only helps, and a coder that spends bits where they are worth more, too.
        assert row["unquantised"] < row["dealt"] < 0.3
        assert row["dead zone"] < 1.02 * row["dealt"]
    for name in ("dealt", "unquantised", "uniform", "dead zone"):
        errors = [row[name] for row in sorted(rows, key=lambda row: row["tokens"])]
        assert all(np.diff(errors) < 0)
