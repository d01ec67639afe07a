"""A look-up, and its answer: what is stored of a prompt."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from kvstore.adapters.vllm.step import Part
from kvstore.match import Match


class Found(NamedTuple):
    """What is stored of a prompt. ``matches`` hold ``parts``, those of a prefix or of segments."""

    prefix: int = 0  # leading tokens that are stored as this very prompt's
    tokens: int = 0  # leading tokens that can be had
    parts: tuple[Part, ...] = ()
    matches: tuple[Match, ...] = ()
    approximate: bool = False

    def release(self) -> None:
        """Ends the leases."""
        for match in self.matches:
            match.release()


class Question:
    """A look-up that the look-up thread answers. ``_lock`` guards what both threads see."""

    def __init__(self, ask: Callable[[], Found], computed: int, deadline: float) -> None:
        self.computed, self.deadline = computed, deadline
        self._ask, self._there = ask, threading.Event()
        self._lock = threading.Lock()
        self._found = Found()
        self._dropped = False

    def run(self) -> None:
        """Answers it, if anybody still wants to know; in the look-up thread."""
        with self._lock:
            wanted = not self._dropped and time.monotonic() < self.deadline
        if not wanted:
            return
        found = self._ask()
        with self._lock:
            wanted, self._found = not self._dropped, found
        if not wanted:
            found.release()
        self._there.set()

    def answer(self, patience: float) -> Found | None:
        """What was found; None if that is not known yet."""
        return self._found if self._there.wait(patience) else None

    def drop(self) -> None:
        """Nothing of it is wanted any more; what was found is known still, as far as it needs no lease."""
        with self._lock:
            self._dropped = True
            self._found.release()
            self._found = Found(self._found.prefix)
