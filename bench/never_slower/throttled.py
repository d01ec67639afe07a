"""A disk that is as slow as one says: the system's files behind a bucket that fills at a rate."""

from __future__ import annotations

import threading
import time

from kvstore.files import OsFiles

CHUNK = 256 << 10  # bytes that are moved at once; transfers at the same time take turns with these


class Bucket:
    """So many bytes a second, for all who take from it together, in the order in which they come. No burst."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._lock = threading.Lock()
        self._free = 0.0  # when all that was taken is through (``time.monotonic``); guarded by _lock

    def take(self, size: int) -> float:
        """When these bytes are through."""
        with self._lock:
            self._free = max(self._free, time.monotonic()) + size / self._rate
            return self._free


class ThrottledFiles(OsFiles):
    """``OsFiles`` that reads and writes no more than ``rate`` bytes a second together."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self._bucket = Bucket(rate)

    def _read_some(self, fd: int, buffer: memoryview, offset: int) -> int:
        until = self._bucket.take(len(buffer[:CHUNK]))
        done = super()._read_some(fd, buffer[:CHUNK], offset)
        _wait(until)
        return done

    def _write_some(self, fd: int, data: memoryview, offset: int) -> int:
        until = self._bucket.take(len(data[:CHUNK]))
        done = super()._write_some(fd, data[:CHUNK], offset)
        _wait(until)
        return done


def _wait(until: float) -> None:
    """What the bucket makes of the time is what is simulated, so it is slept through."""
    time.sleep(max(0.0, until - time.monotonic()))
