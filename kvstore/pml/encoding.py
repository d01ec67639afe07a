"""Modules as they are computed ahead: what sees what, and which part of which chain each text becomes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvstore.composition import Composition, Placement, Text
from kvstore.keys import TOKEN_BYTES
from kvstore.pml.modules import Leaf, Module, Parameter
from kvstore.walk import chains_of


@dataclass(frozen=True, eq=False)
class Encoding:
    """Modules that are computed together, and see each other. ``composition`` has texts only; it is prefilled whole."""

    modules: tuple[Module, ...]
    composition: Composition
    placed: dict[Leaf, Placement]  # positions are those of ``composition``

    def fits(self, stands: Iterable[tuple[object, int]]) -> bool:
        """Whether all of its text stands in a prompt, as far apart as here. ``stands``: what is there, and where."""
        moved = [position - self.placed[item].position for item, position in stands if item in self.placed]
        return len(moved) == len(self.placed) and len(set(moved)) == 1


def encoding(
    modules: Sequence[Module], stands: Iterable[tuple[Leaf | Parameter, int]], placeholder: bytes, context: bytes
) -> Encoding | None:
    """Modules with their items where these stand relative to each other; None if there is no text to encode.

    Every chain begins with ``context``, which is not placed. Room for arguments is filled, for the text behind it.
    """
    items = list(stands)
    while items and isinstance(items[-1][0], Parameter):
        items.pop()  # nothing stands behind it that could see it
    if not items:
        return None
    before = len(context) // TOKEN_BYTES
    base = before - items[0][1]
    parts = [Text(context, 0)] if context else []
    for item, position in items:
        tokens = item.token_ids if isinstance(item, Leaf) else item.filled(placeholder)
        parts.append(Text(tokens, base + position))
    composition = Composition(tuple(parts))
    chains = chains_of(composition)[len(parts) - len(items) :]
    placed = {item: chain for (item, _), chain in zip(items, chains, strict=True) if isinstance(item, Leaf)}
    return Encoding(tuple(modules), composition, placed)
