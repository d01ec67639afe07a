"""ARC: recency and frequency, in shares that adapt; leaf before parent."""

from __future__ import annotations

from kvstore.policies.ghosts import Ghosts
from kvstore.policies.leaves import NONE
from kvstore.policies.queued import Queued
from kvstore.policy import Arrival

ONCE, AGAIN = 0, 1


class ARC(Queued):
    """Two LRU lists, of blocks that were used once and of those that were used again. Blocks that come back soon after
    they were evicted from one list show that it is too short, and move the share that it may take. After Megiddo and
    Modha, "ARC: a self-tuning, low overhead replacement cache" (2003).
    """

    def __init__(self) -> None:
        super().__init__(queues=2)
        self._names = self._leaves.names()
        self._ghosts = Ghosts(), Ghosts()
        self._target = 0.0  # blocks that were used once may be so many

    def _came(self, block: int, arrival: Arrival) -> int:
        self._names[block] = arrival.name
        once, again = self._ghosts
        if arrival.name in once:
            self._target = min(self._target + max(1, len(again) / len(once)), self._capacity)
            once.recall(arrival.name)
            return AGAIN
        if arrival.name in again:
            self._target = max(self._target - max(1, len(once) / len(again)), 0)
            again.recall(arrival.name)
            return AGAIN
        return ONCE

    def _use(self, block: int) -> None:
        self._move(block, AGAIN)

    def _from(self) -> int:
        return ONCE if len(self._queues[ONCE]) > self._target else AGAIN

    def _spared(self, block: int, leaf: bool) -> int:
        return NONE if leaf else self._queue[block]

    def _evicted(self, block: int) -> None:
        self._ghosts[self._queue[block]].remember(self._names[block])
        once, again = self._ghosts
        once.trim(self._capacity - len(self._queues[ONCE]))
        again.trim(2 * self._capacity - len(self) - len(once))
