"""Names from outside as text of a plot: all of them, as they are, without a warning."""

import warnings

import pytest

from elastictok_jax.evaluation.report.figures import LETTERS, figure_label, figure_log_ticks, plt

NAMES = {
    "plain": "plain",
    "$x$": "$x$",
    r"\\$\frac{1}": r"\\$\frac{1}",
    "_run": " _run",
    "a\nb": r"a\nb",
    "tab\x1b[1m": r"tab\x1b[1m",
    "caf\udce9": r"caf\udce9",
    "\U0001f9ff\u0378": r"\U0001f9ff\u0378",
    "naïve": "naïve",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_are_shown_as_they_are_or_as_in_python(name):
    assert figure_label(name) == NAMES[name]


def test_long_names_lose_their_middle():
    text = figure_label("first" + "x" * 300 + "last")
    assert len(text) == LETTERS
    assert text.startswith("first") and text.endswith("last") and "…" in text


def test_every_name_is_drawn_and_in_the_legend(tmp_path):
    figure, axes = plt.subplots()
    for name in NAMES:
        axes.plot([1, 10], [0.1, 10], label=figure_label(name))
    axes.set(xscale="log", yscale="log", title=figure_label("$"))
    figure_log_ticks(axes.xaxis, axes.yaxis)
    legend = axes.legend()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(tmp_path / "plot.svg")
        figure.savefig(tmp_path / "plot.png")
    assert [text.get_text() for text in legend.get_texts()] == list(NAMES.values())
    ticks = [text.get_text() for text in axes.get_xticklabels()]
    assert "1" in ticks and not any("$" in text for text in ticks)
    plt.close(figure)
