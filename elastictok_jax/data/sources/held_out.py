"""Chooses the items of a data source that are held out from training."""

import ml_collections
import numpy as np


def held_out_items(place: np.ndarray, *, fraction: float) -> np.ndarray:
    """Returns which items are held out from training, a `fraction` by hash: bool [n].

    The split depends on the original's name alone, so adding files moves none, and all clips of
    one original are on one side. The exception is a small data set where chance picks no or all
    originals: then the one with the lowest hash is held out, or the one with the highest is not.
    """
    chosen = place < np.uint64(min(fraction * 2.0**64, 2.0**64 - 2048))
    if len(place) and chosen.all():
        chosen &= place != place.max()
    if not chosen.any() and fraction > 0 and (place != place[:1]).any():
        chosen = place == place.min()
    return chosen


def has_held_out(config: ml_collections.ConfigDict) -> bool:
    """Returns whether the config holds out data from training."""
    sources = [source for source in config.data.sources.values() if source.weight]
    return config.data.eval_fraction > 0 or any(
        source.path == "embedded" or source.heldout_split for source in sources
    )
