"""A cache of metadata: which blocks a policy would have kept. Pure Python; what a simulator runs, too."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import islice

from kvstore.policy import Arrival, EvictionPolicy


class Shadow:
    """Holds up to ``capacity`` blocks between requests, and ``spare`` more while one is served, as a store does.

    One request follows the other: what it finds is touched and held; room is made for what it brings, as far as that
    can be; it comes in and is arranged; then the cache shrinks to its capacity again, and any block may go.
    """

    def __init__(self, policy: EvictionPolicy, capacity: int, spare: int = 1 << 62) -> None:
        self.policy, self.capacity, self.spare = policy, capacity, spare
        self.evictions = self.stored = 0  # blocks
        self._number: dict[Hashable, int] = {}
        self._name: list[Hashable] = []  # by number
        self._free: list[int] = []

    def __len__(self) -> int:
        return len(self._number)

    def present(self, names: Sequence[Hashable]) -> list[int]:
        """Numbers of the leading blocks that are here."""
        found: list[int] = []
        for name in names:
            number = self._number.get(name)
            if number is None:
                break
            found.append(number)
        return found

    def request(self, names: Sequence[Hashable], tokens: Sequence[int]) -> int:
        """Serves a chain of blocks, root first, with so many tokens each. Returns how many blocks were found."""
        here, hit = self._number, self.present(names)
        self.policy.touch(hit)
        room = self._make_room(len(names) - len(hit), set(hit))
        stored = names[: len(hit) + room]
        for at in range(len(hit), len(stored)):
            if names[at] not in here:
                self._insert(names[at], tokens[at], here[names[at - 1]] if at else -1)
        self.policy.arrange([here[name] for name in stored], served=True)
        for number in list(islice(self.policy.victims(), max(len(here) - self.capacity, 0))):
            self._evict(number)
        return len(hit)

    def _make_room(self, blocks: int, held: set[int]) -> int:
        """Evicts what is not held, until so many slots are free or nothing more may go; how many of them are."""
        while (room := self.capacity + self.spare - len(self._number)) < blocks:
            victim = next((block for block in self.policy.victims() if block not in held), None)
            if victim is None:
                break
            self._evict(victim)
        return min(room, blocks)

    def _insert(self, name: Hashable, tokens: int, parent: int) -> None:
        number = self._free.pop() if self._free else len(self._name)
        if number == len(self._name):
            self._name.append(None)
        self._name[number] = name
        self._number[name] = number
        self.stored += 1
        self.policy.insert(number, Arrival(tokens, tokens, name, parent))

    def _evict(self, number: int) -> None:
        self.policy.remove(number)
        del self._number[self._name[number]]
        self._free.append(number)
        self.evictions += 1
