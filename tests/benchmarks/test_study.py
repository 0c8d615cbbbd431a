"""The study's document: figures over seeds, each from the models that it names."""

import re

import pytest

from benchmarks import study
from elastictok_jax.experiment_registry import get_experiment

TARGETS = (study.STRICT, study.LOOSE)


def thresholds(share):
    keys = ("tokens_mean", "tokens_p95", "tokens_max", "seconds_per_block")
    row = dict.fromkeys(keys, 10.0) | {"met_share": share, "met_share_at_half": share / 2}
    return [{"target": target, "encoder_passes_per_block": 3.0} | row for target in TARGETS]


def result(seed, *, ratio):
    """What `elastictok evaluate` writes of a seed's five models, as far as the study reads it."""
    models = []
    for place, name in enumerate(study.MODELS):
        elastic = name in {"elastic", "unconditioned"}
        r = {"pearson_r": 0.5, "pearson_r_of_log_energy": 0.6, "spearman_r": 0.7}
        of_kind = {"clips": 2, "blocks": 4, "thresholds": thresholds(0.1 * (place + 1))}
        videos = of_kind | {"energy": {"single_block": r, "multi_block": r} if elastic else None}
        images = of_kind | {"energy": {"single_block": r} if elastic else None}
        models.append({"name": f"{name}-{seed}", "images": images, "videos": videos})
    comparisons = [
        {
            "clips": kind,
            "target": target,
            "elastic": f"{elastic}-{seed}",
            "fixed": f"{fixed}-{seed}",
            "met_share": share if kind == "videos" else share / 2,
            "ratio": None
            if ratio is None or elastic == "unconditioned"
            else ratio + share + target,
            "ratio_missed_alike": ratio if elastic == "elastic" else None,
        }
        for kind in ("images", "videos")
        for target in TARGETS
        for elastic in ("unconditioned", "elastic")
        for fixed, share in (("fixed25", 0.25), ("fixed50", 0.5), ("fixed100", 1.0))
    ]
    return {"models": models, "comparisons": comparisons}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([None, None], "-"),
        ([2.0], "2"),
        ([1.0, 2.0, 6.0], "3 (1 to 6)"),
        ([1.0, None, 3.0], "2 (1 to 3, 2 of 3 seeds)"),
        ([1.5, None], "1.5, 1 of 2 seeds"),
    ],
)
def test_a_figure_over_seeds(values, said):
    assert study.over_seeds(values) == said


def test_ratios_stand_beside_the_papers():
    rows = study.ratio_rows([result(0, ratio=1.0), result(1, ratio=2.0), result(2, ratio=None)])
    paper = {(row["clips"], row["MSE"]): row["paper's ratio"] for row in rows}
    assert paper == study.PAPER_RATIOS
    assert rows[0]["MSE"] == study.LOOSE
    assert rows[0]["ratio to fixed100"] == "2.54 (2.04 to 3.04, 2 of 3 seeds)"
    assert rows[0]["missed alike, fixed100"] == "1.5 (1 to 2, 2 of 3 seeds)"
    assert rows[0]["ratio to fixed25"] == "1.79 (1.29 to 2.29, 2 of 3 seeds)"
    shares = [row["share met by fixed50"] for row in rows]
    assert shares == 2 * ["0.25 (0.25 to 0.25)"] + 2 * ["0.5 (0.5 to 0.5)"]  # images, then videos


def test_the_papers_ratios_stand_at_targets_of_the_study():
    assert {study.LOOSE, study.STRICT} <= set(get_experiment("study_elastic").evaluation.targets)


def test_clips_of_one_kind_are_enough():
    results = [result(0, ratio=1.0)]
    for model in results[0]["models"]:
        del model["videos"]
    rows = study.ratio_rows(results), study.conditioning_rows(results), study.energy_rows(results)
    assert {row["clips"] for some in rows for row in some} == {"images"}
    assert [row["paper's r"] for row in rows[2]] == [0.77, 0.77]


def test_the_conditioned_encoder_stands_beside_the_other():
    (row, *_) = study.conditioning_rows([result(0, ratio=1.0)])
    assert row["met share, conditioned"] == "0.1"
    assert row["met share, not"] == "0.2"
    assert row["encoder passes per block, conditioned"] == "3"


def test_the_document_holds_what_it_shows(tmp_path):
    page, output = tmp_path / "evaluation-0", tmp_path / "docs"
    (page / "plots").mkdir(parents=True)
    output.mkdir()
    (page / "report.html").write_text("<!doctype html>")
    for name in ("targets_met_by_tokens_used", "tokens_and_high_frequency_energy"):
        (page / "plots" / f"{name}.png").write_bytes(b"png")
    (output / "study_notes.md").write_text("What agrees.\n")
    study.write_study(
        [result(0, ratio=1.0), result(1, ratio=2.0)],
        output=output,
        command="python -m benchmarks.study",
        page=page,
    )
    text = (output / "study.md").read_text()
    assert "What agrees." in text
    assert "`python -m benchmarks.study`" in text
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) == 3
    assert all((output / link).is_file() for link in links)
    assert text.count("| fixed50 | videos |") == len(TARGETS)
