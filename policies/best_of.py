"""Follows the best of several policies, as caches of metadata that each runs by itself say which that is."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence

from kvstore.policies.base import Unlearning
from kvstore.policies.lru import LRU
from kvstore.policies.lru2 import LRU2
from kvstore.policies.pace import Pace
from kvstore.policies.shadow import Shadow
from kvstore.policy import Arrival, Clock, EvictionPolicy

Make = Callable[[Clock], EvictionPolicy]
CANDIDATES: tuple[Make, ...] = (Pace, lambda clock: LRU2(), lambda clock: LRU())
_FORGET = 0.999  # what hits are worth after each request, of what they were
_BETTER = 1.02  # so many times the leader's hits make another one the leader


class BestOf(Unlearning):
    """Every candidate orders the real blocks, and each has a shadow of the real cache's size. Victims are the leader's.

    Costs two of each candidate, in time and memory.
    """

    def __init__(self, clock: Clock, candidates: Sequence[Make] = CANDIDATES) -> None:
        self._policies = [make(clock) for make in candidates]
        self._shadows = [Shadow(make(clock), 1 << 62) for make in candidates]
        self._hits = [0.0] * len(candidates)  # tokens, by candidate
        self.leader = 0
        self._known: dict[int, tuple[Hashable, int]] = {}  # name and tokens

    def insert(self, block: int, arrival: Arrival) -> None:
        """See ``EvictionPolicy``."""
        self._known[block] = arrival.name, arrival.tokens
        for policy in self._policies:
            policy.insert(block, arrival)

    def touch(self, chain: Sequence[int]) -> None:
        """See ``EvictionPolicy``."""
        for policy in self._policies:
            policy.touch(chain)

    def arrange(self, chain: Sequence[int], served: bool = False) -> None:
        """See ``EvictionPolicy``. A request that is over is served by the shadows, too."""
        for policy in self._policies:
            policy.arrange(chain, served)
        known = [self._known[block] for block in chain if block in self._known] if served else []
        if not known:
            return
        names, tokens = [name for name, _ in known], [count for _, count in known]
        for at, shadow in enumerate(self._shadows):
            found = shadow.request(names, tokens)
            self._hits[at] = self._hits[at] * _FORGET + sum(tokens[:found])
        best = max(range(len(self._hits)), key=self._hits.__getitem__)
        if self._hits[best] > self._hits[self.leader] * _BETTER:
            self.leader = best

    def remove(self, block: int) -> None:
        """See ``EvictionPolicy``."""
        self._known.pop(block, None)
        for policy in self._policies:
            policy.remove(block)

    def victims(self) -> Iterator[int]:
        """See ``EvictionPolicy``: the leader's. That they are asked for says how much the cache holds."""
        for shadow in self._shadows:
            shadow.capacity = max(1, len(self._known))
        return self._policies[self.leader].victims()

    def __len__(self) -> int:
        return len(self._known)
