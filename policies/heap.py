"""Blocks in the order of their ranks, in which they can be read without any change."""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from kvstore.policies.leaves import NONE

Rank = float | tuple[float, float]  # all of one kind in one heap
_SLACK = 64  # entries that no longer count, which are always let lie


class Heap:
    """Blocks by rank. Entries that no longer count lie in it until they are met, or are more than those that do."""

    def __init__(self) -> None:
        self._heap: list[tuple[Rank, int]] = []
        self._entries: dict[int, tuple[Rank, int]] = {}  # those that count, by block

    def put(self, block: int, rank: Rank) -> None:
        """O(log n), amortised. The block has this rank from now on, and no other."""
        self._entries[block] = entry = (rank, block)
        if len(self._heap) < 2 * len(self._entries) + _SLACK:
            heappush(self._heap, entry)
        else:
            self._heap = list(self._entries.values())
            heapify(self._heap)

    def drop(self, block: int) -> None:
        """O(1). The block is not in it from now on."""
        self._entries.pop(block, None)

    def walk(self) -> Walk:
        """O(log n), amortised. Reads from the lowest rank on, for as long as the heap is not changed."""
        heap, entries = self._heap, self._entries
        while heap and entries.get(heap[0][1]) is not heap[0]:
            heappop(heap)
        return Walk(heap, entries)

    def __bool__(self) -> bool:
        """Whether a block is in it."""
        return bool(self._entries)

    def __len__(self) -> int:
        """Entries, with those that no longer count."""
        return len(self._heap)


class Walk:
    """Reads a heap in order, and in their places what is added on the way, in O(log n) for each block."""

    def __init__(self, heap: list[tuple[Rank, int]], entries: dict[int, tuple[Rank, int]]) -> None:
        self._heap, self._entries = heap, entries
        self._front = [(heap[0], 0)] if heap else []  # what may come next: with its place in the heap, or NONE
        self._read = NONE  # the place of what came last; what is behind it there is not in front yet

    def add(self, block: int, rank: Rank) -> None:
        """A block that is not in the heap, for this walk only."""
        heappush(self._front, ((rank, block), NONE))

    def next(self) -> int:
        """The block with the lowest rank of those that are left; NONE when there is none."""
        front, heap = self._front, self._heap
        while True:
            if self._read != NONE:
                for place in range(2 * self._read + 1, min(2 * self._read + 3, len(heap))):
                    heappush(front, (heap[place], place))
            if not front:
                return NONE
            entry, self._read = heappop(front)
            if self._read == NONE or self._entries.get(entry[1]) is entry:
                return entry[1]
