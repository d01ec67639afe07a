"""How quickly something comes, as measured."""

from __future__ import annotations

import time


class Throughput:
    """Bytes in a second over the last stretch in which something was on its way. The caller's lock guards it."""

    def __init__(self) -> None:
        self.rate = 0.0  # 0: nothing came yet
        self._since = self._bytes = 0.0

    def begins(self) -> None:
        """Something is asked for, and nothing else is on its way: a stretch begins."""
        self._since, self._bytes = time.perf_counter(), 0.0

    def came(self, size: int) -> None:
        """So many bytes came."""
        self._bytes += size
        self.rate = self._bytes / max(time.perf_counter() - self._since, 1e-6)
