"""Parses references to the weights of a model: RUN (the newest), RUN@best or RUN@STEP."""

import os
from pathlib import Path

BEST = "best"


def split_reference(model: str | os.PathLike) -> tuple[Path, str | int | None]:
    """Returns the folder of a model, and BEST, a step, or None for the newest.

    A path that exists is taken literally, even if its name contains "@".
    """
    text = os.fspath(model)
    folder, at, which = text.rpartition("@")
    if at and folder and not os.path.lexists(text):
        if which == BEST:
            return Path(folder), BEST
        if which.isascii() and which.isdecimal():
            return Path(folder), int(which)
    return Path(text), None
