"""What is remembered of blocks that were evicted."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

from kvstore.policies.leaves import NONE


class Ghosts:
    """Names of evicted blocks, each with a number. O(1) for each name that comes or goes; about 140 bytes and the
    name in memory."""

    def __init__(self) -> None:
        self._numbers: OrderedDict[Hashable, int] = OrderedDict()  # longest gone first

    def remember(self, name: Hashable, number: int = 0) -> None:
        """The name is the latest."""
        self._numbers[name] = number
        self._numbers.move_to_end(name)

    def recall(self, name: Hashable) -> int:
        """The number that came with the name, which is forgotten; NONE for a name that is not known."""
        return self._numbers.pop(name, NONE)

    def trim(self, limit: int) -> None:
        """Forgets the oldest names, until at most ``limit`` are left."""
        while len(self._numbers) > max(limit, 0):
            self._numbers.popitem(last=False)

    def __contains__(self, name: Hashable) -> bool:
        return name in self._numbers

    def __len__(self) -> int:
        return len(self._numbers)
