"""Blocks that are to go at a time of day. The store's lock guards every call."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from kvstore.index import Index


class Expiry:
    """A heap of (when, block number, its sequence); what became of a block meanwhile, its sequence tells."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, int]] = []

    def at(self, number: int, sequence: int, when: float) -> None:
        """A block is to go at ``when`` (Unix seconds). O(log n)."""
        heapq.heappush(self._heap, (when, number, sequence))

    def due(self, index: Index, now: float) -> Iterator[int]:
        """Takes out the blocks whose time has come. What is added meanwhile counts."""
        while self._heap and self._heap[0][0] <= now:
            _, number, sequence = heapq.heappop(self._heap)
            if index.sequence[number] != sequence or not index.present(number):
                continue
            if index.expires[number] > now:  # it was saved again with more time
                self.at(number, sequence, index.expires[number])
            elif index.expires[number]:
                yield number
