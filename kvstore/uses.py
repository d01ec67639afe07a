"""When each block was last found, and how often: columns beside those of the index. The store's lock guards every call.

A number stands for another block once its sequence is another, so nobody has to tell when a block leaves or comes: what
is known of a number counts only as long as its sequence is the one that it was noted for. Twenty bytes a block.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from kvstore.errors import BadInput
from kvstore.histogram import Histogram
from kvstore.index import Index


class Uses:
    """Uses of blocks, and histograms of the time between them. One per store."""

    def __init__(self, index: Index, wall: Callable[[], float]) -> None:
        self._index, self._wall = index, wall
        self._sequence = array("Q")  # of the block that the other two columns are about
        self._last = array("d")  # Unix seconds
        self._times = array("I")
        self.saved_seconds = 0.0  # of prefill that loads have spared engines, as these say
        self._reuse_gap = Histogram()
        self._idle = {tier: Histogram() for tier in ("host", "disk")}  # of blocks when they were evicted from there

    def use(self, numbers: Iterable[int], now: float) -> None:
        """A match found these blocks. A fraction of a microsecond for a block."""
        self._grow()
        sequence, known, last, times = self._index.sequence, self._sequence, self._last, self._times
        before, alike = now, 0  # blocks in a row were mostly used together
        for number in numbers:
            if known[number] != sequence[number]:
                self._begin(number)
            if last[number] != before:
                self._reuse_gap.add(now - before, alike)
                before, alike = last[number], 0
            alike += 1
            last[number] = now
            times[number] += 1
        self._reuse_gap.add(now - before, alike)

    def saved(self, seconds: float) -> None:
        """See ``Store.saved``."""
        given: object = seconds
        if not isinstance(given, int | float) or not (math.isfinite(given) and given >= 0):
            raise BadInput(f"seconds={given!r} is no time that was saved; give 0 or more")
        self.saved_seconds += seconds

    def evicted(self, tier: str, numbers: Iterable[int]) -> None:
        """These blocks are about to be evicted from a tier."""
        now = self._wall()
        for number in numbers:
            self._idle[tier].add(now - self.last(number))

    def last(self, number: int) -> float:
        """When a block was last found, or else when it was saved (Unix seconds)."""
        return self._last[number] if self._knows(number) else self._index.created[number]

    def times(self, number: int) -> int:
        """How often a block was found since the store was opened."""
        return self._times[number] if self._knows(number) else 0

    def restore(self, used: Sequence[float]) -> None:
        """Takes in when the blocks that an index has restored were last used."""
        self._sequence, self._last = array("Q", self._index.sequence), array("d", used)
        self._times = array("I", bytes(self._times.itemsize * len(used)))

    def histograms(self) -> dict[str, Any]:
        """``reuse_gap_seconds``, between two uses of a block, and ``idle_before_evict_seconds`` by tier."""
        idle = {tier: histogram.snapshot() for tier, histogram in self._idle.items()}
        return {"reuse_gap_seconds": self._reuse_gap.snapshot(), "idle_before_evict_seconds": idle}

    def _knows(self, number: int) -> bool:
        return number < len(self._sequence) and self._sequence[number] == self._index.sequence[number]

    def _begin(self, number: int) -> None:
        index = self._index
        self._sequence[number], self._last[number] = index.sequence[number], index.created[number]
        self._times[number] = 0

    def _grow(self) -> None:
        more = len(self._index.key) - len(self._sequence)
        if more > 0:  # no block has the sequence 0
            for column in (self._sequence, self._last, self._times):
                column.frombytes(bytes(column.itemsize * more))
