"""LRU-2: by the last use but one, leaf before parent."""

from __future__ import annotations

from kvstore.policies.ghosts import Ghosts
from kvstore.policies.leaves import NONE
from kvstore.policies.ranked import Ranked
from kvstore.policy import Arrival


class LRU2(Ranked):
    """Evicts the leaf whose last use but one was longest ago; first of all those that were used once, the oldest first.

    The last use of evicted blocks is remembered, so that one that comes back has been used twice. After O'Neil, O'Neil
    and Weikum, "The LRU-K page replacement algorithm for database disk buffering" (1993), with K = 2. Uses that belong
    together are one here already: those of one request.
    """

    def __init__(self, ghosts: int = 1 << 20) -> None:
        """``ghosts``: how many evicted blocks are remembered at most."""
        super().__init__()
        self._last = self._leaves.integers()  # when it was used
        self._before = self._leaves.integers()  # and the time before; 0: never
        self._names = self._leaves.names()
        self._ghosts = Ghosts()
        self._limit = ghosts

    def _rank(self, block: int) -> tuple[float, float]:
        return self._before[block], self._time[block]

    def _came(self, block: int, arrival: Arrival) -> None:
        self._names[block] = arrival.name
        last = self._ghosts.recall(arrival.name)
        self._before[block] = 0 if last == NONE else last
        self._last[block] = self._now

    def _use(self, block: int) -> None:
        self._before[block], self._last[block] = self._last[block], self._now

    def _evicted(self, block: int) -> None:
        self._ghosts.remember(self._names[block], self._last[block])
        self._ghosts.trim(self._limit)
