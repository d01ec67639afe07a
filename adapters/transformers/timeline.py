"""When each layer of a hit was fetched, loaded and computed: what shows whether loading hides under compute."""

from __future__ import annotations

import threading
from dataclasses import dataclass

FETCH, LOAD, COMPUTE = "fetch", "load", "compute"


@dataclass(frozen=True, slots=True)
class Span:
    """One piece of work on one layer, from ``begin`` to ``end`` in seconds of ``time.perf_counter``.

    ``kind`` "fetch": the layer's bytes come from disk and are checked; "load": they are turned and written where the
    model reads; "compute": the model's own work of that layer, in the forward pass that the load was for.
    """

    kind: str
    layer: int
    begin: float
    end: float


class Timeline:
    """The spans of one hit. ``add`` and ``spans`` may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spans: list[Span] = []  # guarded by _lock

    def add(self, kind: str, layer: int, begin: float, end: float) -> None:
        """Notes one span."""
        with self._lock:
            self._spans.append(Span(kind, layer, begin, end))

    def spans(self) -> list[Span]:
        """Everything noted so far, by the time it began."""
        with self._lock:
            return sorted(self._spans, key=lambda span: span.begin)
