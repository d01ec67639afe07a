"""S3-FIFO: three queues, of which one holds names only; leaf before parent."""

from __future__ import annotations

from kvstore.policies.ghosts import Ghosts
from kvstore.policies.leaves import NONE
from kvstore.policies.queued import Queued
from kvstore.policy import Arrival

SMALL, MAIN = 0, 1
SHARE = 0.1  # of all blocks, which the small queue is to hold
MOST = 3  # uses that count


class S3FIFO(Queued):
    """New blocks pass through a small queue. Those that were used there more than once go on to the main queue; others
    are evicted and remembered, and join the main queue when they come back soon. That is a CLOCK that counts to three.
    After Yang, Zhang, Qiu, Yue and Rashmi, "FIFO queues are all you need for cache eviction" (2023).
    """

    def __init__(self) -> None:
        super().__init__(queues=2)
        self._uses = self._leaves.integers()
        self._names = self._leaves.names()
        self._ghosts = Ghosts()

    def _came(self, block: int, arrival: Arrival) -> int:
        self._uses[block] = 0
        self._names[block] = arrival.name
        return SMALL if self._ghosts.recall(arrival.name) == NONE else MAIN

    def _use(self, block: int) -> None:
        self._uses[block] = min(self._uses[block] + 1, MOST)

    def _from(self) -> int:
        return SMALL if len(self._queues[SMALL]) >= SHARE * self._capacity else MAIN

    def _spared(self, block: int, leaf: bool) -> int:
        uses = self._uses[block]
        if self._queue[block] == SMALL:
            if leaf and uses <= 1:
                return NONE
            self._uses[block] = 0
        else:
            if leaf and not uses:
                return NONE
            self._uses[block] = max(uses - 1, 0)
        return MAIN

    def _evicted(self, block: int) -> None:
        if self._queue[block] == SMALL:
            self._ghosts.remember(self._names[block])
            self._ghosts.trim(self._capacity - int(SHARE * self._capacity))
