"""What policies have in common that keep blocks in queues, which move on as victims are looked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Sequence

from kvstore.policies.base import Unlearning
from kvstore.policies.leaves import NONE, Leaves
from kvstore.policy import Arrival

PATIENCE = 32  # so many blocks are spared in one queue, then the next victim is looked for in the other


class Queued(Unlearning, ABC):
    """Evicts the block at the head of a queue, if it is a leaf. Subclasses say of which, and what is spared.

    A block that is no leaf moves on when it is met, like one that was used. New blocks of a chain are put leaf first,
    so that a chain that nobody uses any more goes in one piece. Every method is O(1) for each block that is named and
    for each that moves; few do on real loads, as only uses and new blocks behind old ones make them move; n at worst.
    """

    def __init__(self, queues: int) -> None:
        self._leaves = Leaves()
        self._queues: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(queues)]  # the head goes first
        self._queue = self._leaves.integers()  # which one the block is in
        self._ends = [0] * queues  # how many leaves are in each
        self._fresh: set[int] = set()  # came since the last touch, and are not arranged yet
        self._offered: set[int] = set()  # by the latest ``victims``
        self._capacity = 0  # blocks that were held when room was needed
        self._grew = False  # since then

    @abstractmethod
    def _came(self, block: int, arrival: Arrival) -> int:
        """Hook: the block became known. The queue that it joins."""

    @abstractmethod
    def _use(self, block: int) -> None:
        """Hook: the block is used."""

    @abstractmethod
    def _spared(self, block: int, leaf: bool) -> int:
        """Hook: the block is at the head. The queue at whose end it goes on, always for a block that is no leaf; NONE
        when it is to be evicted."""

    def _from(self) -> int:
        """Hook: the queue that the next victim is to come from; of two, the other one when there is none in it."""
        return 0

    def _evicted(self, block: int) -> None:
        """Hook: the block was removed because it was a victim."""

    def insert(self, block: int, arrival: Arrival) -> None:
        """A new block is the last in its queue."""
        parent, leaves = arrival.parent, self._leaves
        covers = parent in leaves and leaves.is_leaf(parent)
        if not leaves.add(block, parent):
            return
        if covers:
            self._ends[self._queue[parent]] -= 1
        self._grew = True
        self._fresh.add(block)
        self._queue[block] = queue = self._came(block, arrival)
        self._queues[queue][block] = None
        self._ends[queue] += leaves.is_leaf(block)

    def touch(self, chain: Sequence[int]) -> None:
        """Root last."""
        self._fresh.clear()
        for block in reversed(chain):
            if block in self._leaves:
                self._use(block)

    def arrange(self, chain: Sequence[int], served: bool = False) -> None:
        """Puts the new ones among them leaf first."""
        for block in reversed(chain):
            if block in self._fresh:
                self._fresh.remove(block)
                self._queues[self._queue[block]].move_to_end(block)

    def _move(self, block: int, queue: int) -> None:
        """To the end of a queue."""
        was = self._queue[block]
        if was == queue:
            self._queues[queue].move_to_end(block)
            return
        del self._queues[was][block]
        self._queues[queue][block] = None
        self._queue[block] = queue
        if self._leaves.is_leaf(block):
            self._ends[was] -= 1
            self._ends[queue] += 1

    def remove(self, block: int) -> None:
        """What ``victims`` gave last counts as evicted; others went for reasons that say nothing about their worth."""
        if block not in self._leaves:
            return
        queue = self._queue[block]
        del self._queues[queue][block]
        self._ends[queue] -= self._leaves.is_leaf(block)
        parent = self._leaves.discard(block)
        if parent != NONE:
            self._ends[self._queue[parent]] += 1
        self._fresh.discard(block)
        if block in self._offered:
            self._evicted(block)

    def victims(self) -> Iterator[int]:
        """Blocks that are spared on the way stay where they moved; those that were given are at the heads again."""
        self._offered.clear()
        if self._grew:
            self._capacity, self._grew = len(self._leaves), False
        ends, gone, bare = self._ends.copy(), dict[int, int](), set[int]()
        held: list[int] = []
        spared = 0  # since the last victim
        try:
            while any(ends):
                queue = (self._from() + spared // PATIENCE) % len(ends)
                if not ends[queue]:
                    queue = 1 - queue
                block = next(iter(self._queues[queue]))
                leaf = self._leaves.is_leaf(block) or block in bare
                onward = self._spared(block, leaf)
                if onward != NONE:
                    self._move(block, onward)
                    ends[queue] -= leaf
                    ends[onward] += leaf
                    spared += 1
                    continue
                spared = 0
                self._offered.add(block)
                yield block
                del self._queues[queue][block]
                held.append(block)
                ends[queue] -= 1
                parent = self._leaves.uncovered(block, gone)
                if parent != NONE:  # a leaf from here on, were those gone that were given
                    bare.add(parent)
                    ends[self._queue[parent]] += 1
        finally:
            for block in reversed(held):
                self._queues[self._queue[block]][block] = None
                self._queues[self._queue[block]].move_to_end(block, last=False)

    def __len__(self) -> int:
        return len(self._leaves)
