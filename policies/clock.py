"""CLOCK, or second chance, leaf before parent."""

from __future__ import annotations

from kvstore.policies.leaves import NONE
from kvstore.policies.queued import Queued
from kvstore.policy import Arrival


class CLOCK(Queued):
    """Goes round the blocks in the order in which they came, and evicts the first leaf that was not used since the last
    round. After Corbató, "A paging experiment with the Multics system" (1968)."""

    def __init__(self) -> None:
        super().__init__(queues=1)
        self._bit = self._leaves.integers()  # 1: used since the last round

    def _came(self, block: int, arrival: Arrival) -> int:
        self._bit[block] = 0
        return 0

    def _use(self, block: int) -> None:
        self._bit[block] = 1

    def _spared(self, block: int, leaf: bool) -> int:
        if leaf and not self._bit[block]:
            return NONE
        self._bit[block] = 0
        return 0
