"""Writes rows of results as CSV."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from elastictok_jax.storage.atomic import write_atomically


def csv_columns(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the keys of rows in order, without those that are None in every row."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return [key for key in keys if any(row.get(key) is not None for row in rows)]


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes rows, whose keys may differ, as CSV with a header; None gives an empty cell."""
    text = io.StringIO()
    keys = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(text, keys, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode(errors="backslashreplace"))
