"""The offline optimum: Belady's MIN with bypass, which knows when each block is used next."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush

from kvstore.bench.simulate.requests import Request

_NEVER = 1 << 62


class Minimum:
    """Keeps the blocks whose next use is nearest, of those it holds and those that a request brings.

    Every request that uses a block uses its parent, so a parent's next use is never later than its child's; where they
    are equal the deeper one goes first. So what is held is closed under prefixes without being forced to be, and its
    hits, which no cache of blocks can beat, are prefix hits: the optimum, in blocks. Serves ``requests`` in order.
    """

    def __init__(self, requests: Sequence[Request], capacity: int) -> None:
        self.evictions = self.stored = 0  # blocks
        self._capacity = capacity
        self._nexts = _next_uses(requests)
        self._served = 0
        self._held: dict[int, int] = {}  # next use, by block
        self._furthest: list[tuple[int, int, int]] = []  # a heap of (-next use, -depth, block), with some that are past

    def serve(self, request: Request, queue: Sequence[Request] = ()) -> int:
        """How many leading blocks are there. ``queue`` tells it nothing new. O(log n) for each block, amortised."""
        held, furthest = self._held, self._furthest
        hit = sum(block in held for block in request.blocks)
        for depth, (block, use) in enumerate(zip(request.blocks, self._nexts[self._served], strict=True)):
            known = held.pop(block, None) is not None
            if use == _NEVER:
                self.evictions += known
                continue
            self.stored += not known
            held[block] = use
            heappush(furthest, (-use, -depth, block))
        while len(held) > self._capacity:
            use, _, block = heappop(furthest)
            if held.get(block) == -use:
                del held[block]
                self.evictions += 1
        self._served += 1
        return hit


def _next_uses(requests: Sequence[Request]) -> list[list[int]]:
    """For each block of each request, the number of the next request that uses it."""
    later: dict[int, int] = {}
    found = []
    for number in range(len(requests) - 1, -1, -1):
        blocks = requests[number].blocks
        found.append([later.get(block, _NEVER) for block in blocks])
        later.update(dict.fromkeys(blocks, number))
    return found[::-1]
