"""When not to ask: a remote tier that fails is left alone for a while, then tried once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

LIMIT = 3  # failures in a row
FIRST, LONGEST, GROWTH = 1.0, 60.0, 2.0  # seconds to leave it alone; each time in a row so many times longer


class Breaker:
    """Closed: ask. Open: do not, but for one who tries again when the time has come. Any thread."""

    def __init__(
        self,
        opened: Callable[[], None] = lambda: None,
        mended: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``opened`` is called each time that it opens, and ``mended`` when it closes again, by the thread whose doing
        that was."""
        self._opened, self._mended, self._clock = opened, mended, clock
        self._lock = threading.Lock()  # guards the fields below
        self._failures = 0
        self._rest = FIRST
        self._until: float | None = None  # open until then, and until somebody has tried
        self._trying = False
        self.opens = 0

    @property
    def closed(self) -> bool:
        """Whether to ask."""
        return self._until is None

    def try_again(self) -> bool:
        """True for one caller once it was open long enough: it asks, and says how that went."""
        with self._lock:
            if self._until is None or self._clock() < self._until:
                return False
            if self._trying and self._clock() < self._until + self._rest:
                return False
            self._trying, self._until = True, self._clock()
            return True

    def succeeded(self) -> None:
        """An exchange went well, and in time."""
        with self._lock:
            open_before = self._until is not None
            if open_before and not self._trying:
                return  # it began before the breaker opened
            self._failures, self._rest, self._until, self._trying = 0, FIRST, None, False
        if open_before:
            self._mended()

    def failed(self) -> None:
        """An exchange failed, or came too late."""
        with self._lock:
            self._failures += 1
            if self._until is not None and not self._trying:
                return
            if self._until is None and self._failures < LIMIT:
                return
            if self._trying:
                self._rest = min(self._rest * GROWTH, LONGEST)
            self._until, self._trying = self._clock() + self._rest, False
            self.opens += 1
        self._opened()
