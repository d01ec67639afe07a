"""SGLang's threads get an answer whatever happens: what goes wrong is a miss, counted, and told once of each kind."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

log = logging.getLogger("kvstore")

T = TypeVar("T")


class Guard:
    """Counts by kind. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    @property
    def counts(self) -> dict[str, int]:
        """How often what went wrong."""
        with self._lock:
            return dict(self._counts)

    def answer(self, verb: str, instead: T, ask: Callable[..., T], *arguments: Any) -> T:
        """What ``ask`` answers, or ``instead`` when it raises."""
        try:
            return ask(*arguments)
        except Exception as error:
            self.note(f"{verb}: {type(error).__name__}", str(error))
            return instead

    def note(self, kind: str, why: str) -> None:
        """Something went wrong, in a way that has a name."""
        with self._lock:
            self._counts[kind] += 1
            first = self._counts[kind] == 1
        if first:
            log.warning("SGLang is answered with a miss (%s): %s; more of this kind is only counted", kind, why)
