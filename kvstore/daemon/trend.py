"""How much was found and held lately, all stores together: samples at even distances, the latest of them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

TIERS = ("device", "host", "disk", "remote")
EVERY = 2.0  # seconds between samples
KEPT = 900  # of them: half an hour


class Sample(NamedTuple):
    """``asked`` and ``hits`` (tokens, by tier) since the stores were opened; ``used``: bytes by tier."""

    at: float  # Unix seconds
    asked: int
    hits: tuple[int, ...]
    used: tuple[int, ...]


class Trend:
    """The latest samples. Any thread."""

    def __init__(self, kept: int = KEPT) -> None:
        self._lock = threading.Lock()
        self._samples: deque[Sample] = deque(maxlen=kept)  # guarded by _lock

    def take(self, at: float, stats: Iterable[Mapping[str, Any]]) -> None:
        """One sample more, of what ``Store.stats`` gave for each store."""
        asked, hits, used = 0, [0] * len(TIERS), [0] * len(TIERS)
        for numbers in stats:
            counters = numbers["counters"]
            asked += counters.get("asked_tokens", 0)
            for place, tier in enumerate(TIERS):
                hits[place] += counters.get(f"{tier}_hit_tokens", 0)
                used[place] += numbers["tiers"].get(tier, {}).get("used", 0)
        with self._lock:
            self._samples.append(Sample(at, asked, tuple(hits), tuple(used)))

    def since(self, at: float) -> dict[str, Any]:
        """The samples after a moment, in columns: ``at``, ``asked``, ``hits`` and ``used`` by tier."""
        with self._lock:
            samples = [sample for sample in self._samples if sample.at > at]
        return {
            "at": [sample.at for sample in samples],
            "asked": [sample.asked for sample in samples],
            "hits": {tier: [sample.hits[place] for sample in samples] for place, tier in enumerate(TIERS)},
            "used": {tier: [sample.used[place] for sample in samples] for place, tier in enumerate(TIERS)},
        }
