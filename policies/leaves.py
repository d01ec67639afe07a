"""Which of the known blocks have no known blocks behind them: those that may go."""

from __future__ import annotations

from array import array
from collections.abc import Hashable

NONE = -1  # no block
_AWAY = -2  # in place of the parent of a block that is not known


class Leaves:
    """The forest of known blocks: parents and numbers of children, in columns by block, so that a million blocks take
    16 MB and none of the collector's time.

    Blocks are small numbers from 0 on. A block may come before its parent. When it is gone, its number may come again
    for another block, but not while a known block names it as its parent. Every method is O(1).
    """

    def __init__(self) -> None:
        self._known = 0
        self._room = 0  # entries of each column
        self._columns: list[array[int] | array[float]] = []
        self._names: list[list[Hashable]] = []
        self._parent = array("q")
        self._children = self.integers()  # known ones; of blocks that are not known, too

    def integers(self) -> array[int]:
        """A column of the caller's own, read and written by known block: 0 until it is written. Asked for before any
        block is added; what a block wrote stays for the next one of its number."""
        self._columns.append(column := array("q"))
        return column

    def floats(self) -> array[float]:
        """The same of floats."""
        self._columns.append(column := array("d"))
        return column

    def names(self) -> list[Hashable]:
        """The same of names: None until it is written."""
        column: list[Hashable] = []
        self._names.append(column)
        return column

    def add(self, block: int, parent: int) -> bool:
        """A block becomes known, behind ``parent`` (below 0: none). False, and no change, when it is known already."""
        if block >= self._room or parent >= self._room:
            self._grow(max(block, parent) + 1)
        if self._parent[block] != _AWAY:
            return False
        self._known += 1
        if parent < 0:
            self._parent[block] = NONE
        else:
            self._parent[block] = parent
            self._children[parent] += 1
        return True

    def discard(self, block: int) -> int:
        """A block goes, if it is known. Returns its parent when that is known and has become a leaf; else NONE."""
        if block not in self:
            return NONE
        parent = self._parent[block]
        self._known -= 1
        self._parent[block] = _AWAY
        if parent == NONE:
            return NONE
        self._children[parent] = left = self._children[parent] - 1
        return NONE if left or self._parent[parent] == _AWAY else parent

    def uncovered(self, block: int, gone: dict[int, int]) -> int:
        """``discard`` in thought, of one known block after the other: nothing changes but ``gone``, which starts empty.

        Returns the block's parent when that is known and would have become a leaf; else NONE.
        """
        parent = self._parent[block]
        if parent == NONE:
            return NONE
        gone[parent] = count = gone.get(parent, 0) + 1
        return NONE if count < self._children[parent] or self._parent[parent] == _AWAY else parent

    def is_leaf(self, block: int) -> bool:
        """Whether no known block stands right behind this known block."""
        return not self._children[block]

    def __contains__(self, block: int) -> bool:
        return -1 < block < self._room and self._parent[block] != _AWAY

    def __len__(self) -> int:
        return self._known

    def _grow(self, room: int) -> None:
        more = max(room - self._room, self._room // 4, 1024)
        self._parent.extend(array("q", [_AWAY]) * more)
        for column in self._columns:
            column.frombytes(bytes(column.itemsize * more))
        for names in self._names:
            names.extend([None] * more)
        self._room += more
