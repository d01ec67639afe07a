"""The names of all settings, and which of them somebody meant."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import cache

from kvstore.settings.document import Keys
from kvstore.settings.rows import ANY, leaves
from kvstore.settings.schema import Settings


def nearest(word: str, words: Sequence[str]) -> str | None:
    """The one of ``words`` that is most like ``word``, if any is."""
    found = difflib.get_close_matches(word.lower().replace("-", "_"), words, 1)
    return found[0] if found else None


def meant(keys: Keys) -> Keys | None:
    """The setting or table that is called most like one that there is not: beside it, or elsewhere."""
    candidates: dict[str, Keys] = {}
    known_beside = beside(keys)
    for known in known_names():
        full = tuple(keys[1] if part == ANY and len(keys) > 1 else part for part in known)
        if not known_beside:  # what it is in is not known either
            candidates["__".join(full)] = full
        elif ANY not in full:
            candidates |= {known[-1]: known, "_".join(known): known}
    candidates |= {name: (*keys[:-1], name) for name in known_beside}
    found = nearest(keys[-1] if known_beside else "__".join(keys), list(candidates))
    return candidates[found] if found else None


def beside(keys: Keys) -> list[str]:
    """What can be set where ``keys`` was; nothing if there is no such place."""
    above = (keys[0], ANY) if len(keys) == 3 and keys[0] == "tenants" else keys[:-1]
    return [known[-1] for known in known_names() if known[:-1] == above]


@cache
def known_names() -> tuple[Keys, ...]:
    """All settings and tables; those of a tenant below ``ANY``."""
    names: dict[Keys, None] = {}
    for leaf in leaves(Settings()):
        names |= {leaf.keys[:length]: None for length in range(1, len(leaf.keys) + 1)}
    return tuple(names)
