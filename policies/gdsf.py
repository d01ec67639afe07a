"""Greedy dual size with frequency, by what it costs to compute a block again, leaf before parent."""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.policies.ranked import Ranked
from kvstore.policy import Arrival

SLOPE = 0.0168 / 512  # of a dense model with 8B parameters: attention to one more token, as a share of all other work


class GDSF(Ranked):
    """Evicts the leaf of the lowest worth: uses times cost per byte, and on top the age of the cache at its last use.

    The age is the worth of the last block that was evicted. A block costs what its tokens do, each the more, the more
    tokens are before the block, since it attends to all of them. Between equals, the one that was used longest ago
    goes. After Cherkasova, "Improving WWW proxies performance with greedy-dual-size-frequency caching policy" (1998).
    """

    def __init__(self, slope: float = SLOPE) -> None:
        """``slope``: how much the cost of a token grows with each token before its block, as a share of its cost at the
        start of a prompt. 0: where a block stands does not count."""
        super().__init__()
        self._slope = slope
        self._uses = self._leaves.integers()
        self._size = self._leaves.integers()
        self._tokens = self._leaves.integers()
        self._depth = self._leaves.integers()  # tokens before the block, as far as it is known
        self._worth = self._leaves.floats()
        self._age = 0.0

    def _rank(self, block: int) -> tuple[float, float]:
        return self._worth[block], self._time[block]

    def insert(self, block: int, arrival: Arrival) -> None:
        """A block that comes before its parent passes for the first of its chain, until that is used."""
        super().insert(block, arrival)
        self._size[block], self._tokens[block] = arrival.size, arrival.tokens

    def touch(self, chain: Sequence[int]) -> None:
        """Shows how deep the blocks stand, too."""
        depth = 0
        for block in chain:
            if block in self._leaves:
                self._depth[block] = depth = max(depth, self._depth[block])
                depth += self._tokens[block]
        super().touch(chain)

    def _came(self, block: int, arrival: Arrival) -> None:
        parent = arrival.parent
        self._depth[block] = self._depth[parent] + self._tokens[parent] if parent in self._leaves else 0
        self._size[block], self._tokens[block] = arrival.size, arrival.tokens
        self._uses[block] = 0
        self._use(block)

    def _use(self, block: int) -> None:
        self._uses[block] += 1
        cost = self._tokens[block] * (1 + self._slope * self._depth[block])
        self._worth[block] = self._age + self._uses[block] * cost / self._size[block]

    def _evicted(self, block: int) -> None:
        self._age = max(self._age, self._worth[block])
