"""Draws docs/architecture.svg from the imports of the package.

    python -m tools.draw_rooms -o docs/architecture.svg

A box is a room, a package or module right below `elastictok_jax`, with the first line of its
docstring. Rooms import only rooms in rows below; an import that others imply is not drawn. Numbers
say which way the data goes.
"""

import argparse
import ast
import html
import textwrap
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "elastictok_jax"
WAY = ("data", "training", "storage", "tokenizer", "evaluation")  # of the data, from files on
# Small modules that everything uses say nothing in a picture.
LEFT_OUT = {"errors", "paths", "progress", "streams", "ctrl_c", "__init__", "__main__"}
BOX, ROW, GAP, MARGIN = (178, 64), 104, 22, 24  # pixels
LETTERS = 27  # of a line in a box
STYLE = """
text { font-family: sans-serif; fill: #222 } .name { font-size: 14px; font-weight: bold }
.says { font-size: 10.5px } .box { fill: #eef3f8; stroke: #4a6785 } .edge { stroke: #9aa7b4 }
.way { fill: #d55e00 } .number { font-size: 12px; fill: white; font-weight: bold }
"""


def sources() -> dict[str, str]:
    """Returns the source of each module of the package, by its name from the package on."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path.read_text()
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def room_of(module: str) -> str:
    """Returns the room of a module; the protocols and the registry of models are one of their own,
    which lies far below the families."""
    if module.startswith(("models.base", "models.registry")):
        return "models.base"
    return module.split(".", maxsplit=1)[0]


def imports() -> dict[str, set[str]]:
    """Returns the rooms that each room imports, anywhere in its modules."""
    found: dict[str, set[str]] = {}
    for module, source in sources().items():
        room = room_of(module)
        names = found.setdefault(room, set())
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                "elastictok_jax"
            ):
                inside = (node.module or "").removeprefix("elastictok_jax").lstrip(".")
                found_names = [f"{inside}.{alias.name}".lstrip(".") for alias in node.names]
                names |= {room_of(name) for name in found_names}
    return {
        room: {name for name in names if name in found and name not in {room, *LEFT_OUT}}
        for room, names in found.items()
        if room not in LEFT_OUT
    }


def ranks(below: dict[str, set[str]]) -> dict[str, int]:
    """Returns the row of each room: one above the highest that it imports.

    A room that imports parts of another which itself imports it (`storage.checkpoint` reads
    layers, which `storage.atomic` serves) is cut where the cycle closes.
    """
    rank: dict[str, int] = {}

    def of(room: str, seen: tuple[str, ...]) -> int:
        if room not in rank:
            rank[room] = 1 + max(
                (of(name, (*seen, room)) for name in below[room] if name not in seen), default=-1
            )
        return rank[room]

    for room in below:
        of(room, (room,))
    return rank


def reduced(below: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Returns the imports that no chain of others implies."""

    def reaches(start: str, goal: str, seen: set[str]) -> bool:
        seen.add(start)
        return any(
            name == goal or (name not in seen and reaches(name, goal, seen))
            for name in below[start]
        )

    return [
        (room, name)
        for room, names in below.items()
        for name in sorted(names)
        if not any(other != name and reaches(other, name, {room}) for other in names)
    ]


def says(room: str) -> str:
    """Returns the first line of a room's docstring."""
    if room == "models.base":
        return "Task and Codec, the two protocols of a model family, and their registry."
    path = PACKAGE / room / "__init__.py"
    path = path if path.is_file() else PACKAGE / f"{room}.py"
    return (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()[0]


def draw() -> str:
    """Returns the picture as SVG."""
    below = imports()
    rank = ranks(below)
    rows = [sorted(r for r in rank if rank[r] == level) for level in range(max(rank.values()) + 1)]
    width = max(len(row) for row in rows) * (BOX[0] + GAP) - GAP + 2 * MARGIN
    height = len(rows) * ROW + 2 * MARGIN + 20
    place = {}
    for level, row in enumerate(rows):
        left = (width - len(row) * (BOX[0] + GAP) + GAP) / 2
        for column, room in enumerate(row):
            place[room] = left + column * (BOX[0] + GAP), height - MARGIN - 20 - ROW * (level + 1)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}"><style>{STYLE}</style>',
        f'<rect width="{width:g}" height="{height:g}" fill="white"/>',
    ]
    for room, name in reduced(below):
        (x1, y1), (x2, y2) = place[room], place[name]
        half = BOX[0] / 2
        parts.append(
            f'<line class="edge" x1="{x1 + half:g}" y1="{y1 + BOX[1]:g}" '
            f'x2="{x2 + half:g}" y2="{y2:g}"/>'
        )
    for room, (x, y) in place.items():
        parts.append(
            f'<rect class="box" x="{x:g}" y="{y:g}" width="{BOX[0]}" height="{BOX[1]}" rx="6"/>'
            f'<text class="name" x="{x + 10:g}" y="{y + 19:g}">{room}</text>'
        )
        for line, text in enumerate(textwrap.wrap(says(room), LETTERS)[:3]):
            parts.append(
                f'<text class="says" x="{x + 10:g}" y="{y + 34 + 12 * line:g}">'
                f"{html.escape(text)}</text>"
            )
        if room in WAY:
            at = f'cx="{x + BOX[0] - 14:g}" cy="{y + 14:g}"'
            parts.append(
                f'<circle class="way" {at} r="10"/><text class="number" text-anchor="middle" '
                f'x="{x + BOX[0] - 14:g}" y="{y + 18:g}">{WAY.index(room) + 1}</text>'
            )
    parts.append(
        f'<text class="says" x="{MARGIN}" y="{height - 12:g}">Lines: imports, from above to below. '
        f"Numbers: the way of the data, {', '.join(WAY)}.</text></svg>"
    )
    return "\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.parse_args().output.write_text(draw())


if __name__ == "__main__":
    main()
