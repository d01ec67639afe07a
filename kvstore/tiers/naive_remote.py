"""The naive twin of the remote tier: a dict in memory that stores of one process share. Tests hold Redis against it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from kvstore.errors import Corrupt, TierError
from kvstore.tiers.base import Copy, Look, Missing, Wanted
from kvstore.tiers.seal import HEADER_PART, Envelope, Seal, unpack


class Shelf:
    """What stores share: sealed headers and parts, and when each block was put, used last and is to go."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.lock = threading.Lock()
        self.parts: dict[tuple[bytes, int], bytes] = {}
        self.copies: dict[bytes, tuple[Copy, float]] = {}  # and until when; the one used last is last


class NaiveRemote:
    """``Remote`` on a shelf. See ``base.Remote`` for what each method promises."""

    place = "this process"

    def __init__(self, shelf: Shelf, budget: int | None = None, secret: bytes | None = None) -> None:
        self._shelf, self._budget, self._seal = shelf, budget, Seal(secret)
        self._refused, self._closed = 0, False

    def _there(self) -> None:
        """What is over goes. Locked."""
        if self._closed:
            raise TierError("the remote tier is closed")
        shelf, now = self._shelf, self._shelf.clock()
        for copy, until in list(shelf.copies.values()):
            if until <= now:
                self._forget(copy)

    def _forget(self, copy: Copy) -> bool:
        for part in (HEADER_PART, *range(copy.parts)):
            self._shelf.parts.pop((copy.key, part), None)
        return self._shelf.copies.pop(copy.key, None) is not None

    def _part(self, key: bytes, part: int) -> memoryview | None:
        data = self._shelf.parts.get((key, part))
        return None if data is None else self._seal.open(key, part, data)

    def find(self, keys: Sequence[bytes], seconds: float) -> list[Envelope | None]:
        """See ``Remote``."""
        with self._shelf.lock:
            self._there()
            return [self._envelope(key) for key in keys]

    def _envelope(self, key: bytes) -> Envelope | None:
        try:
            data = self._part(key, HEADER_PART)
            return None if data is None else unpack(bytes(data))
        except Corrupt:
            self._refused += 1
            return None

    def read(self, wanted: Sequence[Wanted], seconds: float) -> list[TierError | None]:
        """See ``Remote``."""
        with self._shelf.lock:
            self._there()
            return [self._fill(each) for each in wanted]

    def _fill(self, wanted: Wanted) -> TierError | None:
        try:
            data = self._part(wanted.key, wanted.part)
        except Corrupt as error:
            self._refused += 1
            return error
        if data is None:
            return Missing("a part is not there any more")
        if len(data) != len(wanted.buffer):
            return Corrupt("a part has another length")
        wanted.buffer[:] = data
        return None

    def refresh(self, copies: Sequence[Copy], seconds: float) -> list[bool]:
        """See ``Remote``."""
        shelf = self._shelf
        with shelf.lock:
            self._there()
            whole = []
            for copy in copies:
                there = [(copy.key, part) in shelf.parts for part in (HEADER_PART, *range(copy.parts))]
                whole.append(all(there))
                if copy.key in shelf.copies:
                    shelf.copies[copy.key] = shelf.copies.pop(copy.key)[0], shelf.clock() + copy.ttl
            return whole

    def put(self, copy: Copy, envelope: Envelope, parts: Sequence[memoryview], seconds: float) -> None:
        """See ``Remote``."""
        shelf = self._shelf
        with shelf.lock:
            self._there()
            self._forget(copy)
            for part, data in enumerate(parts):
                shelf.parts[copy.key, part] = bytes(self._seal.close(copy.key, part, data))
            shelf.parts[copy.key, HEADER_PART] = bytes(self._seal.close(copy.key, HEADER_PART, envelope.pack()))
            shelf.copies[copy.key] = copy, shelf.clock() + copy.ttl
            while self._budget is not None and self._used() > self._budget:
                self._forget(next(iter(shelf.copies.values()))[0])

    def _used(self) -> int:
        return sum(copy.bytes for copy, _ in self._shelf.copies.values())

    def drop(self, copies: Sequence[Copy], seconds: float) -> int:
        """See ``Remote``."""
        with self._shelf.lock:
            self._there()
            return sum([self._forget(copy) for copy in copies])

    def scan(self, look: Look, seconds: float) -> None:
        """See ``Remote``."""
        shelf = self._shelf
        with shelf.lock:
            self._there()
            parts: dict[bytes, int] = {}
            for key, part in shelf.parts:
                parts[key] = max(parts.get(key, 0), 0 if part == HEADER_PART else part + 1)
            found = [(key, count, self._envelope(key)) for key, count in parts.items()]
        look(found)

    def reset(self) -> None:
        """See ``Remote``. There are no connections."""

    def gauges(self) -> dict[str, int]:
        """See ``Remote``."""
        with self._shelf.lock:
            used = 0 if self._budget is None else self._used()
        return {"used": used, "capacity": self._budget or 0, "refused": self._refused}

    def close(self) -> None:
        """See ``Remote``."""
        self._closed = True
