"""A policy that knows the queue: what waiting jobs will read stays longest, that of the nearest job longest of all.

CachedAttention's eviction around any other policy, which goes on to order what no job needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, filterfalse

from kvstore.policy import Arrival, EvictionPolicy


class LookAhead:
    """``EvictionPolicy`` whose victims are: what ``let_go`` named; what no job needs, in the inner policy's order; then
    what jobs need, the block whose first use is furthest first.

    A block's place is that in the nearest job that needs it. Every chain begins with its root, so that a parent is
    never further away than what stands behind it. Once removed, a block is needed no more until the next ``schedule``.
    """

    def __init__(self, policy: EvictionPolicy) -> None:
        self._policy = policy
        self._places: dict[int, int] = {}  # of blocks that jobs need, in the order of their first use
        self._ends: list[int] = []  # the place behind the blocks of each job and of those before it
        self._exempt = 0  # blocks at places before this one stay
        self._spent: dict[int, None] = {}
        self.state, self.learn = policy.state, policy.learn

    def schedule(self, chains: Sequence[Sequence[int]]) -> None:
        """What the waiting jobs will read, the nearest job first: each job's blocks, root first, known here or not.

        Replaces what was said before, ``protect`` included. O(blocks named).
        """
        order: dict[int, None] = {}
        self._ends = []
        for each in chains:
            order.update(dict.fromkeys(each))
            self._ends.append(len(order))
        self._places = dict(zip(order, range(len(order)), strict=True))
        self._exempt = 0
        self._take_back(order)

    def protect(self, window: int) -> None:
        """What the first ``window`` jobs need is no victim from now on; 0: everything may be one."""
        self._exempt = self._ends[min(window, len(self._ends)) - 1] if window > 0 and self._ends else 0

    def let_go(self, blocks: Iterable[int]) -> None:
        """Nobody came for these blocks, which are known and which no job needs: they go before all others, in this
        order (children first), unless somebody comes after all."""
        self._spent.update(dict.fromkeys(blocks))

    def insert(self, block: int, arrival: Arrival) -> None:
        """See ``EvictionPolicy``."""
        place = self._places.get(block)
        if place is not None and arrival.parent >= 0 and self._places.get(arrival.parent, place) >= place:
            del self._places[block]  # its parent was away meanwhile, and is no longer needed
        self._policy.insert(block, arrival)

    def touch(self, chain: Sequence[int]) -> None:
        """See ``EvictionPolicy``."""
        self._take_back(chain)
        self._policy.touch(chain)

    def arrange(self, chain: Sequence[int], served: bool = False) -> None:
        """See ``EvictionPolicy``."""
        self._take_back(chain)
        self._policy.arrange(chain, served)

    def _take_back(self, blocks: Iterable[int]) -> None:
        """Somebody came."""
        for block in blocks if self._spent else ():
            self._spent.pop(block, None)

    def remove(self, block: int) -> None:
        """See ``EvictionPolicy``."""
        if self._places or self._spent:
            self._places.pop(block, None)
            self._spent.pop(block, None)
        self._policy.remove(block)

    def victims(self) -> Iterator[int]:
        """See ``EvictionPolicy``; without what ``protect`` keeps. Passing over a needed block costs some 30 ns."""
        order: Iterator[int] = self._policy.victims()
        if self._places:
            order = chain(filterfalse(self._places.__contains__, order), self._needed())
        if self._spent:
            order = chain(self._spent, filterfalse(self._spent.__contains__, order))
        return order

    def _needed(self) -> Iterator[int]:
        """Furthest first. Asked for what comes first only when all others are gone or have to stay."""
        known = set(filter(self._places.__contains__, self._policy.victims()))
        for block, place in reversed(self._places.items()):
            if place < self._exempt:
                return
            if block in known:
                yield block

    def admits(self, block: int) -> bool:
        """See ``EvictionPolicy``; what a job will read is."""
        return block in self._places or self._policy.admits(block)

    def __len__(self) -> int:
        return len(self._policy)
