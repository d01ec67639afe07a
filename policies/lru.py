"""Least recently used, leaf before parent."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

from kvstore.policies.base import Unlearning
from kvstore.policy import Arrival


class LRU(Unlearning):
    """Evicts the block that was used longest ago.

    A chain is touched from its last block to its root, so a parent is always younger than its children and the plain
    order of age is leaf-first without any tree.
    """

    def __init__(self) -> None:
        self._order: OrderedDict[int, None] = OrderedDict()  # oldest first

    def insert(self, block: int, arrival: Arrival) -> None:
        """O(1). A new block is the youngest until its chain is arranged."""
        self._order[block] = None

    def touch(self, chain: Sequence[int]) -> None:
        """O(len(chain)); root last, so that it is the youngest."""
        order = self._order
        for block in reversed(chain):
            if block in order:
                order.move_to_end(block)

    def arrange(self, chain: Sequence[int], served: bool = False) -> None:
        """The same."""
        self.touch(chain)

    def remove(self, block: int) -> None:
        """O(1)."""
        self._order.pop(block, None)

    def victims(self) -> Iterator[int]:
        """Oldest first."""
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)
