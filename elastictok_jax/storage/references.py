"""Which weights of a model are meant: RUN, the newest; RUN@best; RUN@STEP."""

import os
from pathlib import Path

BEST = "best"


def split_reference(model: str | os.PathLike) -> tuple[Path, str | int | None]:
    """The folder of a model, and BEST, a step, or None for the newest.

    A path that exists is taken as it is, whatever is in its name.
    """
    text = os.fspath(model)
    folder, at, which = text.rpartition("@")
    if at and folder and not os.path.lexists(text):
        if which == BEST:
            return Path(folder), BEST
        if which.isascii() and which.isdecimal():
            return Path(folder), int(which)
    return Path(text), None
