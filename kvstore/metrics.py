"""Counters: monotonic, named, cheap. Exported as they are by ``Store.stats``."""

from __future__ import annotations

from collections import Counter
from threading import Lock


class Counters:
    """Named counters. ``add`` may be called from any thread."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._values: Counter[str] = Counter()  # guarded by _lock

    def add(self, name: str, amount: int = 1) -> None:
        """Adds ``amount`` to ``name``."""
        with self._lock:
            self._values[name] += amount

    def snapshot(self) -> dict[str, int]:
        """All counters at one moment."""
        with self._lock:
            return dict(self._values)
