"""First in, first out, leaf before parent."""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.policies.ranked import Ranked


class FIFO(Ranked):
    """Evicts the leaf that came first.

    A chain that grows at its end is protected there by its latest blocks, so on conversations this is close to LRU.
    """

    def _rank(self, block: int) -> float:
        return self._time[block]

    def touch(self, chain: Sequence[int]) -> None:
        """Nothing: use does not count."""

    def arrange(self, chain: Sequence[int], served: bool = False) -> None:
        """Nothing: blocks stand in the order in which they came."""
