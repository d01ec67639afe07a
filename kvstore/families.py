"""Children of blocks, sorted by token bytes: the best partial match among many is found by one bisect.

A parent is a block's number or a root's pseudo number (below NONE). Most blocks have one child, which stands in a
column; only larger families have a list. The store's lock guards every call.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Callable

NONE = -1
_MANY = -(1 << 62)
_EAGER_SORT = 64  # families larger than this are sorted at open, smaller ones when first touched


class Families:
    """Which present blocks hang on which parent."""

    def __init__(self, tokens_of: Callable[[int], bytes]) -> None:
        """``tokens_of(number)`` gives the bytes by which children are sorted."""
        self._tokens_of = tokens_of
        self._child = array("q")  # by parent: the only child, NONE, or _MANY
        self._many: dict[int, list[int]] = {}
        self._unsorted: set[int] = set()

    def add_parent(self, number: int) -> None:
        """A number came into use as a possible parent."""
        if number == len(self._child):
            self._child.append(NONE)
        else:
            self._child[number] = NONE

    def drop_parent(self, number: int) -> None:
        """A number goes out of use; it has no children."""
        self._many.pop(number, None)
        self._unsorted.discard(number)

    def children(self, parent: int) -> list[int]:
        """Present children, sorted by token bytes. Not to be changed."""
        if parent >= 0:
            only = self._child[parent]
            if only != _MANY:
                return [] if only == NONE else [only]
        family = self._many.get(parent, [])
        if parent in self._unsorted:
            family.sort(key=self._tokens_of)
            self._unsorted.discard(parent)
        return family

    def size(self, parent: int) -> int:
        """Number of present children."""
        if parent >= 0 and self._child[parent] != _MANY:
            return int(self._child[parent] != NONE)
        return len(self._many.get(parent, ()))

    def link(self, parent: int, number: int, tokens: bytes) -> None:
        """``number`` with these token bytes becomes a child."""
        if parent >= 0 and self._child[parent] == NONE:
            self._child[parent] = number
            return
        family = self._list(parent)
        self.children(parent)  # sorts, when that has waited
        family.insert(bisect_left(family, tokens, key=self._tokens_of), number)

    def unlink(self, parent: int, number: int) -> None:
        """``number`` is no child any more; called while its token bytes are still known."""
        if parent >= 0 and self._child[parent] != _MANY:
            if self._child[parent] == number:
                self._child[parent] = NONE
            return
        family = self._many.get(parent, [])
        if parent in self._unsorted:
            family.remove(number)
        elif family:
            del family[self.position(family, number)]

    def position(self, family: list[int], number: int) -> int:
        """Where ``number`` stands in its sorted family."""
        at = bisect_left(family, self._tokens_of(number), key=self._tokens_of)
        return at if family[at : at + 1] == [number] else family.index(number)

    def neighbours(self, parent: int, tokens: bytes) -> list[int]:
        """The one or two children between which ``tokens`` would stand: one of them shares most leading tokens."""
        family = self.children(parent)
        if len(family) < 2:
            return family
        at = bisect_left(family, tokens, key=self._tokens_of)
        return family[max(at - 1, 0) : at + 1]

    def restore(self, parents: array[int]) -> None:
        """Takes in the parents of numbers 0, 1, 2, ... at once (at open). Large families are sorted now."""
        child, many = self._child, self._many
        child.frombytes(array("q", [NONE]).tobytes() * len(parents))
        for number, parent in enumerate(parents):
            if parent >= 0 and child[parent] == NONE:
                child[parent] = number
            else:
                self._list(parent).append(number)
        for parent, family in many.items():
            if len(family) > 1:
                self._unsorted.add(parent)
        for parent in [p for p in self._unsorted if len(many[p]) > _EAGER_SORT]:
            self.children(parent)

    def _list(self, parent: int) -> list[int]:
        family = self._many.get(parent)
        if family is None:
            family = self._many[parent] = []
            if parent >= 0:
                family.append(self._child[parent])
                self._child[parent] = _MANY
        return family
