"""Blocks whose keys another engine has stored turned: how much of what is found a model can be given, and where it is.

At the positions that they were turned for, such keys are given as they are; elsewhere they are turned by the
difference, for which a kernel must know the rotation. There is no way back to what they were before, bit for bit: so a
block that is to go on is never begun with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from kvstore.match import Match, Miss

UNKNOWN = "rotated"  # the kind of a miss that ends before such a block


class Stretch(NamedTuple):
    """Tokens of a load, ``first`` to ``stop``, whose keys are stored as turned for ``position`` and after."""

    first: int
    stop: int
    position: int


def stretches(load: Any) -> list[Stretch]:
    """All of a load; of None there are none."""
    found: list[Stretch] = []
    start = 0
    for source in load.sources if load is not None else ():
        stop = start + source.tokens
        if source.origin.rotated:
            last = found.pop() if found and found[-1].stop == start else Stretch(start, stop, load.skipped + start)
            found.append(last._replace(stop=stop))
        start = stop
    return found


def readable(blocks: Iterable[tuple[int, str]], turnable: bool) -> int:
    """How many leading tokens are of blocks (tokens, form) that a model can be given, ``turnable`` if kernels turn all
    of its keys."""
    good = 0
    for tokens, form in blocks:
        if form != "pre" and not (turnable and form == "rotated"):
            break
        good += tokens
    return good


def cut(match: Match, turnable: bool, goes_on: bool) -> None:
    """Leaves of a match what a model can be given, and a miss that says so.

    ``goes_on``: what follows is recorded, so a block that matches in part must hold keys before rotation.
    """
    used = [tokens for _, tokens in match.blocks]
    good = match.skipped + readable(zip(used, (origin.form for origin in match.origins), strict=True), turnable)
    if good < match.tokens:
        match.cut(good)
        text = f"keys from token {good} on are stored as another engine had turned them, which this model cannot use"
        match.miss = Miss(UNKNOWN, good, text)
    elif goes_on and used and used[-1] < match.layout.block_tokens and match.origins[-1].rotated:
        good -= used[-1]
        match.cut(good)
        text = f"from token {good} on, a part of a block that another engine has stored is computed again, to go on"
        match.miss = Miss(UNKNOWN, good, text)


def writers_of(loads: Sequence[Any]) -> tuple[str, ...]:
    """Who wrote what is loaded, as far as is known, each once."""
    return tuple(dict.fromkeys(writer for load in loads if load is not None for writer in load.writers))
