"""Least frequently used with dynamic aging, leaf before parent."""

from __future__ import annotations

from kvstore.policies.ranked import Ranked
from kvstore.policy import Arrival


class LFUDA(Ranked):
    """Evicts the leaf of the lowest worth: how often it was used, and on top the age of the cache at its last use.

    The age is the worth of the last block that was evicted, so what was popular once is overtaken by what is used now.
    Between equals, the one that was used longest ago goes. After Arlitt, Cherkasova, Dilley, Friedrich and Jin,
    "Evaluating content management techniques for web proxy caches" (2000).
    """

    def __init__(self) -> None:
        super().__init__()
        self._uses = self._leaves.integers()
        self._worth = self._leaves.integers()
        self._age = 0

    def _rank(self, block: int) -> tuple[float, float]:
        return self._worth[block], self._time[block]

    def _came(self, block: int, arrival: Arrival) -> None:
        self._uses[block] = 0
        self._use(block)

    def _use(self, block: int) -> None:
        self._uses[block] += 1
        self._worth[block] = self._age + self._uses[block]

    def _evicted(self, block: int) -> None:
        self._age = max(self._age, self._worth[block])
