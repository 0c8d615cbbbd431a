"""matplotlib as every plot uses it: no display, no markup, and names shown as they are."""

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

from elastictok_jax.storage.atomic import write_whole

__all__ = ["label", "log_ticks", "plt", "save", "shorten"]

LETTERS = 48  # of a name in a plot
# With more letters than matplotlib's own font; those that are installed help it out.
WIDE_FONTS = ("Noto Sans CJK JP", "Noto Sans CJK SC", "WenQuanYi Zen Hei", "Noto Emoji")

_installed = {font.name for font in font_manager.fontManager.ttflist}
FONTS = ["DejaVu Sans", *(name for name in WIDE_FONTS if name in _installed)]
# A name may hold a `$`, which would begin a formula.
matplotlib.rcParams.update(
    {"text.parse_math": False, "text.usetex": False, "font.family": FONTS, "svg.hashsalt": "plot"}
)


def label(name: str) -> str:
    """A name from outside (a file, a folder, a config) as text of a plot.

    What no font has, or is no letter, is written as in Python (`\\n`, `\\u4e2d`); long names lose
    their middle. A legend leaves out what begins with `_`, so that gets a space before it.
    """
    known = _letters()
    text = "".join(
        letter
        if letter.isprintable() and ord(letter) in known
        else letter.encode("unicode_escape").decode()
        for letter in name
    )
    text = shorten(text, LETTERS)
    return f" {text}" if text.startswith("_") else text


def save(figure: Figure, path: Path, **options) -> None:
    """Writes a figure in the format of the suffix, atomically; `options` of savefig.

    Raises:
      RunError: if it cannot be written.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:], **options)
    write_whole(path, buffer.getvalue())


def shorten(text: str, letters: int) -> str:
    """`text` in at most `letters` letters, its middle left out."""
    if len(text) <= letters:
        return text
    head = max(0, letters - 1) // 3
    return text[:head] + "…" + text[len(text) - max(0, letters - 1 - head) :]


@functools.cache
def _letters() -> frozenset[int]:
    """All that FONTS can show."""
    paths = [font_manager.findfont(name, fallback_to_default=False) for name in FONTS]
    return frozenset().union(*(font_manager.get_font(path).get_charmap() for path in paths))


def log_ticks(*axes: Axis) -> None:
    """Labels of logarithmic axes that do not run into each other. After what is drawn in them."""
    for axis in axes:
        low, high = axis.get_view_interval()
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 50 * low else (1,)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
