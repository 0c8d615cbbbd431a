"""The benchmark of attention runs, its figures mean what they say, and nothing is dropped."""

import json

import numpy as np
import pytest

from benchmarks import attention, check_attention, gpu_report

SMALL = ["--tokens", "96,128", "--block", "64", "--width", "16", "--seconds", "0.01"]


@pytest.mark.parametrize(("tokens", "block"), [(128, 64), (96, 64), (40, 64), (7, 2)])
def test_visible_scores_are_counted(tokens, block):
    block_S = np.arange(tokens) // block
    assert attention.visible_scores(tokens, block) == (block_S[None] <= block_S[:, None]).sum()


def test_figures_and_reasons(tmp_path, capsys):
    out = tmp_path / "out.json"
    names = "dense,blockwise,blockwise:64x32,fused,blockwise:1x2x3,nothing"
    attention.main([*SMALL, "--backends", names, "--json", str(out)])
    results = json.loads(out.read_text())
    printed = capsys.readouterr().out
    assert "1 heads of width 16, blocks of 64 tokens, float32" in printed
    assert len(results["rows"]) == 2 * 6 * 2  # sizes, names, passes
    for row in results["rows"]:
        if row["backend"] in ("dense", "blockwise", "blockwise:64x32"):
            operations = 4 if row["passes"] == "forward" else 12
            operations *= 16 * attention.visible_scores(row["tokens"], 64)
            assert row["tflops"] == pytest.approx(operations / row["ms"] / 1e9)
            share = row["tflops"] / results["matmul_peak_tflops"]
            assert row["share_of_peak"] == pytest.approx(share)
            assert row["note"] == ""
        else:
            assert row["ms"] == ""
    notes = {row["backend"]: row["note"] for row in results["rows"]}
    assert "gpu alone" in notes["fused"]
    assert "QUERIESxKEYS" in notes["blockwise:1x2x3"]
    assert "choose one of" in notes["nothing"]
    assert all(note in printed for note in notes.values())


def test_a_run_that_is_cut_short_leaves_what_it_has_measured(tmp_path, monkeypatch):
    def cut_short(name, *_):
        if name == "dense":
            raise KeyboardInterrupt
        return programs(name, *_)

    programs = attention.programs
    monkeypatch.setattr(attention, "programs", cut_short)
    out = tmp_path / "out.json"
    with pytest.raises(KeyboardInterrupt):
        attention.main([*SMALL, "--backends", "blockwise,dense", "--json", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert [row["backend"] for row in rows] == ["blockwise"] * 2
    assert all(row["share_of_peak"] > 0 for row in rows)


def test_what_does_not_fit_is_listed(tmp_path):
    """A TiB of scores, which only the compiler sees."""
    out = tmp_path / "out.json"
    sizes = ["--tokens", "524288", "--block", "131072", "--width", "2"]
    attention.main([*sizes, "--backends", "dense", "--json", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 2
    assert all("needs" in row["note"] and "GiB" in row["note"] for row in rows)


def test_the_check_finds_a_wrong_backend(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(check_attention, "CASES", ((60, 20, 16),))
    out = tmp_path / "check.json"
    check_attention.main(["--backends", "blockwise,fused", "--json", str(out)])
    rows = json.loads(out.read_text())
    assert [row["right"] for row in rows] == [True] * 4
    assert all(0 < row["largest_error"] < row["tolerance"] for row in rows)

    monkeypatch.setattr(check_attention, "TOLERANCES", {"float32": 1e-12})
    with pytest.raises(SystemExit, match="wrong or did not run"):
        check_attention.main(["--backends", "blockwise,nothing"])
    assert "choose one of" in capsys.readouterr().out


def test_the_report_has_every_step_and_the_end_of_failed_logs(tmp_path):
    attention.main([*SMALL, "--backends", "blockwise", "--json", str(tmp_path / "attention.json")])
    steps = [("check", "failed (1)", 3), ("attention", "passed", 2), ("tiles", "skipped", 0)]
    (tmp_path / "steps.tsv").write_text("".join("\t".join(map(str, s)) + "\n" for s in steps))
    (tmp_path / "check.log").write_text("first\n" * 9 + "the reason\n")
    text = gpu_report.report(tmp_path)
    for name, state, seconds in steps:
        assert f"| {name} | {state} | {seconds} |" in text
    assert "### Attention by backend" in text
    assert "the reason" in text
    assert "### Training step" not in text
