"""A histogram of seconds with fixed bounds, as monitoring systems read it."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

MINUTE, HOUR, DAY = 60.0, 3600.0, 86400.0
BOUNDS = (
    *(1.0, 5.0, 15.0, MINUTE, 5 * MINUTE, 15 * MINUTE, HOUR),
    *(4 * HOUR, 12 * HOUR, DAY, 3 * DAY, 7 * DAY, 30 * DAY),
)


class Histogram:
    """How many observations lie at or below each of ``BOUNDS``. Takes no lock: its owner has one."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS) + 1)  # of each bucket alone; the last is for what is beyond all bounds
        self._sum = 0.0

    def add(self, seconds: float, times: int = 1) -> None:
        """So many observations of ``seconds``; where a clock went back, of 0."""
        seconds = max(seconds, 0.0)
        self._counts[bisect_left(BOUNDS, seconds)] += times
        self._sum += seconds * times

    def snapshot(self) -> dict[str, Any]:
        """``bounds`` in seconds, ``counts`` of each bucket alone (one more than bounds), ``sum`` in seconds."""
        return {"bounds": list(BOUNDS), "counts": list(self._counts), "sum": self._sum}
