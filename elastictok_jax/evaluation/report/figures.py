"""The matplotlib setup of every plot: no display, no markup, and names shown verbatim."""

import functools
import io
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib import font_manager
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from elastictok_jax.storage.atomic import write_atomically

__all__ = ["figure_label", "figure_log_ticks", "plt", "save_figure", "shorten_figure_label"]

LETTERS = 48  # maximum length of a name in a plot
# Fallbacks with more glyphs than matplotlib's own font, used if installed.
WIDE_FONTS = ("Noto Sans CJK JP", "Noto Sans CJK SC", "WenQuanYi Zen Hei", "Noto Emoji")

_installed = {font.name for font in font_manager.fontManager.ttflist}
FONTS = ["DejaVu Sans", *(name for name in WIDE_FONTS if name in _installed)]
# A name may contain a `$`, which would start a formula.
matplotlib.rcParams.update(
    {"text.parse_math": False, "text.usetex": False, "font.family": FONTS, "svg.hashsalt": "plot"}
)


def figure_label(name: str) -> str:
    """Converts an external name (of a file, a folder, a config) to text for a plot.

    Characters that are not printable or in no font are escaped as in Python (`\\n`, `\\u4e2d`);
    long names lose their middle. Legends skip names that begin with `_`, so these get a leading
    space.
    """
    known = _letters()
    text = "".join(
        letter
        if letter.isprintable() and ord(letter) in known
        else letter.encode("unicode_escape").decode()
        for letter in name
    )
    text = shorten_figure_label(text, LETTERS)
    return f" {text}" if text.startswith("_") else text


def save_figure(figure: Figure, path: Path, **options) -> None:
    """Writes a figure atomically, in the format of the suffix, with `options` of savefig.

    Raises:
      RunError: if it cannot be written.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:], **options)
    write_atomically(path, buffer.getvalue())


def shorten_figure_label(text: str, letters: int) -> str:
    """Shortens `text` to at most `letters` characters by cutting its middle."""
    if len(text) <= letters:
        return text
    head = max(0, letters - 1) // 3
    return text[:head] + "…" + text[len(text) - max(0, letters - 1 - head) :]


@functools.cache
def _letters() -> frozenset[int]:
    """Returns the code points of all glyphs in FONTS."""
    paths = [font_manager.findfont(name, fallback_to_default=False) for name in FONTS]
    return frozenset().union(*(font_manager.get_font(path).get_charmap() for path in paths))


def figure_log_ticks(*axes: Axis) -> None:
    """Sets tick labels of log axes that do not overlap. Call it after drawing."""
    for axis in axes:
        low, high = axis.get_view_interval()
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 50 * low else (1,)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
