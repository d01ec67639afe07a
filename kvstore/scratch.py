"""Memory of the moment for slots on their way to disk."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Scratch:
    """Page-aligned memory, lent and taken back: as many pieces as were ever lent at once. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[mmap.mmap] = []

    @contextmanager
    def lend(self, size: int) -> Iterator[memoryview]:
        """``size`` bytes, whatever they hold, until the end of the block."""
        with self._lock:
            piece = self._idle.pop() if self._idle else None
        if piece is None or len(piece) < size:
            piece = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        try:
            yield memoryview(piece)[:size]
        finally:
            with self._lock:
                self._idle.append(piece)
