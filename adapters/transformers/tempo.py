"""When waiting requests will start, by how quickly earlier ones were answered."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

WEIGHT = 0.25  # of the newest measurement


class Tempo:
    """Running means of what a first token takes, its load included, and each one after it. For one thread."""

    def __init__(self) -> None:
        self._first = self._next = 0.0  # seconds; 0: not measured yet

    def first(self, seconds: float) -> None:
        """A request had its first token so long after it was begun."""
        self._first = seconds if not self._first else (1 - WEIGHT) * self._first + WEIGHT * seconds

    def next(self, seconds: float) -> None:
        """One more token of one request took so long."""
        self._next = seconds if not self._next else (1 - WEIGHT) * self._next + WEIGHT * seconds

    def starts(self, running: Sequence[int], waiting: Sequence[int], active: int) -> list[float]:
        """Seconds until each waiting request starts, where ``active`` may run at once.

        ``running`` and ``waiting``: how many tokens each of them may say yet; who says less makes it sooner.
        """
        step = self._next * active  # all that run take turns
        free = [0.0] * (active - len(running)) + [tokens * step for tokens in running]
        heapq.heapify(free)
        starts, now = list[float](), 0.0
        for tokens in waiting:
            now = max(now, free[0])
            starts.append(now)
            now += self._first
            heapq.heapreplace(free, now + tokens * step)
        return starts
