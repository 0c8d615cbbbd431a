"""What the keys of a config mean."""

import re
from collections.abc import Mapping
from typing import Any

from elastictok_jax.config.defaults import SOURCE, TOP, default_sections
from elastictok_jax.config.load import IN_SOURCE


def key_docs(flat: Mapping[str, Any]) -> list[tuple[str, Any, str]]:
    """Returns (key, value, what it means) of a resolved config's dotted keys, sections in order."""
    every = default_sections(flat["model.family"])
    docs = {name: key.doc for name, key in TOP.items()}
    docs |= {f"{s}.{name}": key.doc for s, keys in every.items() for name, key in keys.items()}
    order = list(docs)
    for key in flat:
        if re.match(IN_SOURCE, key):
            docs[key] = SOURCE[key.rpartition(".")[2]].doc
            order.append(key)
    return [(key, flat[key], docs[key]) for key in order if key in flat]
