"""Writes self-contained HTML pages: inline text, tables, plots and video, no script or network."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from elastictok_jax.storage.atomic import write_atomically
from elastictok_jax.storage.csv_files import csv_columns

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 60rem; }
h1 { font-size: 1.5rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
nav ol { columns: 2 16rem; } a:focus-visible, summary:focus-visible, video:focus-visible,
.wide:focus-visible { outline: 3px solid #0072b2; outline-offset: 2px; }
figure { margin: 1rem 0; } figcaption { font-size: 0.9rem; }
img, video { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
.wide { overflow-x: auto; } .wide img { max-width: none; width: 100%; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.6rem; border-bottom: 1px solid #8886; text-align: right; }
th:first-child, td:first-child { text-align: left; }
code { font-size: 0.85rem; } pre { overflow-x: auto; padding: 0.5rem; border: 1px solid #8886; }
"""

DPI = 110  # of plots
LEGIBLE = 0.7  # smallest scale of a plot at which its text is legible


@dataclass(frozen=True)
class Picture:
    """A plot, which scrolls if the screen is too narrow for its text to be legible."""

    image: Figure
    alt: str


@dataclass(frozen=True)
class Video:
    """The bytes of an MP4 file."""

    data: bytes
    label: str


@dataclass(frozen=True)
class Table:
    """A table of rows whose keys may differ."""

    rows: Sequence[dict[str, Any]]
    caption: str


@dataclass(frozen=True)
class Section:
    """A heading, an explanation, and the parts in order."""

    title: str
    text: str
    parts: Sequence[Picture | Video | Table]


def write_html(path: Path, *, title: str, summary: str, command: str, sections: Sequence[Section]):
    """Writes the page atomically. The caller closes the plots."""
    index = "".join(
        f'<li><a href="#s{number}">{escape(section.title)}</a></li>'
        for number, section in enumerate(sections)
    )
    body = "".join(_section(s, number, command) for number, s in enumerate(sections))
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><link rel="icon" href="data:,"><style>{STYLE}</style></head>
<body><header><h1>{escape(title)}</h1><p>{escape(summary)}</p></header>
<nav aria-label="Contents"><ol>{index}</ol></nav><main>{body}</main></body></html>
"""
    write_atomically(path, page.encode(errors="backslashreplace"))


def _section(section: Section, number: int, command: str) -> str:
    parts = "".join(_part(part) for part in section.parts)
    return f"""<section id="s{number}"><h2>{escape(section.title)}</h2>
<p>{escape(section.text)}</p>{parts}
<details><summary>How to make this</summary><pre><code>{escape(command)}</code></pre></details>
</section>"""


def _part(part: Picture | Video | Table) -> str:
    if isinstance(part, Table):
        return _table(part)
    if isinstance(part, Video):
        data = base64.b64encode(part.data).decode()
        return (
            f'<figure><video controls muted loop playsinline preload="auto" '
            f'aria-label="{escape(part.label)}" src="data:video/mp4;base64,{data}"></video>'
            f"<figcaption>{escape(part.label)}</figcaption></figure>"
        )
    data = base64.b64encode(_figure_to_webp(part.image)).decode()
    least = round(LEGIBLE * DPI * part.image.get_figwidth())
    return (
        f'<figure><div class="wide" tabindex="0" role="group" aria-label="{escape(part.alt)}">'
        f'<img alt="{escape(part.alt)}" style="min-width: {least}px" '
        f'src="data:image/webp;base64,{data}"></div>'
        f"<figcaption>{escape(part.alt)}</figcaption></figure>"
    )


def _figure_to_webp(figure: Figure) -> bytes:
    """Renders a figure as WebP, at a fifth of the size of a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="webp", dpi=DPI, pil_kwargs={"quality": 90})
    return buffer.getvalue()


def _table(table: Table) -> str:
    keys = csv_columns(table.rows)
    head = "".join(f'<th scope="col">{escape(key.replace("_", " "))}</th>' for key in keys)
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(html_text(row.get(key)))}</td>" for key in keys) + "</tr>"
        for row in table.rows
    )
    return (
        f'<div class="wide" tabindex="0" role="group" aria-label="{escape(table.caption)}"><table>'
        f"<caption>{escape(table.caption)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )


def html_text(value: Any) -> str:
    """Formats a cell: four digits of a number, a dash for None."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
