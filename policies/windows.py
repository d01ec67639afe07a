"""How far along the queue of waiting jobs prefetch and eviction look (CachedAttention's windows)."""

from __future__ import annotations

FEW_JOBS = 64  # the running mean forgets what lies further back


class Windows:
    """Windows in jobs, from the running mean of what one job's cached segment takes. Any unit of size, always the same.

    Prefetch looks as far as free memory reaches, eviction as far as all tiers do: ``L = C / S_kv``.
    """

    def __init__(self) -> None:
        self._mean = 0.0
        self._jobs = 0

    def saw(self, size: int) -> None:
        """A job came whose cached segment takes so much, beside what jobs before it need anyway."""
        self._jobs = min(self._jobs + 1, FEW_JOBS)
        self._mean += (size - self._mean) / self._jobs

    def prefetch(self, free: int) -> int:
        """Jobs whose segments have room in ``free``: memory that is free now, or that could be. At least the next one,
        as long as anything is free."""
        return max(self.eviction(free), int(free > 0))

    def eviction(self, capacity: int) -> int:
        """Jobs whose segments have room in ``capacity``: that of all tiers together."""
        return int(capacity / self._mean) if self._mean else (1 << 30 if capacity > 0 else 0)
