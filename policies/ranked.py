"""What policies have in common that give every block a rank of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

from kvstore.policies.base import Unlearning
from kvstore.policies.heap import Heap, Rank
from kvstore.policies.leaves import NONE, Leaves
from kvstore.policy import Arrival


class Ranked(Unlearning, ABC):
    """Evicts the leaf with the lowest rank. Subclasses say what the rank is, and what changes it.

    Only leaves are in the heap, so a block's rank is not asked for before it may go. With n leaves, ``insert`` and
    ``remove`` are O(log n), ``touch`` and ``arrange`` O(len(chain) + log n), and so is every step of ``victims``, which
    changes nothing.
    """

    def __init__(self) -> None:
        self._leaves = Leaves()
        self._order = Heap()
        self._offered: set[int] = set()  # by the latest ``victims``
        self._now = 0  # goes up with everything that happens to a block
        self._time = self._leaves.integers()  # of the last use or arrangement: of a chain, the root's is the latest

    @abstractmethod
    def _rank(self, block: int) -> Rank:
        """The lower, the sooner it goes. May change in the hooks below only."""

    def _came(self, block: int, arrival: Arrival) -> None:
        """Hook: the block became known; columns may hold what another one left there."""

    def _use(self, block: int) -> None:
        """Hook: the block is used; its time is still that of before."""

    def _evicted(self, block: int) -> None:
        """Hook: the block was removed because it was a victim."""

    def insert(self, block: int, arrival: Arrival) -> None:
        """A new block is the youngest until its chain is arranged."""
        if self._leaves.add(block, arrival.parent):
            self._order.drop(arrival.parent)
            self._now += 1
            self._came(block, arrival)
            self._place(block)

    def touch(self, chain: Sequence[int]) -> None:
        """Root last, so that it is the youngest."""
        for block in reversed(chain):
            if block in self._leaves:
                self._now += 1
                self._use(block)
                self._place(block)

    def arrange(self, chain: Sequence[int], served: bool = False) -> None:
        """Root last, so that it is the youngest: that decides between blocks of which nothing else does."""
        for block in reversed(chain):
            if block in self._leaves:
                self._now += 1
                self._place(block)

    def _place(self, block: int) -> None:
        self._time[block] = self._now
        if self._leaves.is_leaf(block):
            self._order.put(block, self._rank(block))

    def remove(self, block: int) -> None:
        """What ``victims`` gave last counts as evicted; others went for reasons that say nothing about their worth."""
        if block not in self._leaves:
            return
        self._order.drop(block)
        parent = self._leaves.discard(block)
        if parent != NONE:
            self._order.put(parent, self._rank(parent))
        if block in self._offered:
            self._evicted(block)

    def victims(self) -> Iterator[int]:
        """Leaves by rank; when all children of a block were given, it is a leaf for the rest of the way."""
        self._offered.clear()
        walk = self._order.walk()
        gone: dict[int, int] = {}
        while (block := walk.next()) != NONE:
            self._offered.add(block)
            yield block
            parent = self._leaves.uncovered(block, gone)
            if parent != NONE:
                walk.add(parent, self._rank(parent))

    def __len__(self) -> int:
        return len(self._leaves)
