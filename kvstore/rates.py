"""How quickly the disk moves bytes, as measured while it does, and what it is busy with now."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

from kvstore.policies.cost import Line, Speed

SLICE = 0.25  # seconds of a disk that is never idle that make one measurement, at least
LEAST = 0.01  # seconds of work in one measurement; shorter ones are joined
PART_BYTES = 2 << 20  # of a read, at most
PART_SECONDS = 0.02  # that a read takes, about, where that is less: layers behind it wait so long
# Seconds of work that the disk has at once. Reads come in the order in which layers are needed, which is lost when many
# share the disk; and they have to wait for writes that are under way.
READING, WRITING = 0.05, 0.5
FEW_READS = 2  # at once, at least: a disk is not to wait for checksums

Kind = Literal["read", "write"]


class _Transfer(NamedTuple):
    kind: Kind
    size: int
    begin: float
    end: float


class Rates:
    """Measures a disk that several threads use at once, and says how it is used well. Any thread.

    A measurement is a stretch in which something was always on its way: all bytes that were moved meanwhile, read and
    written, over its length. It counts for what most of the bytes were.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._lock = threading.Lock()  # guards all fields below
        self._active: dict[object, _Transfer] = {}  # their ends are not known
        self._over: list[_Transfer] = []  # of which a part is in no measurement yet
        self._since = 0.0  # when the stretch began
        self._moved: dict[Kind, float] = {"read": 0.0, "write": 0.0}  # in stretches that are no measurement yet
        self._length = 0.0  # of these
        self._speeds: dict[Kind, Speed] = {"read": Speed(), "write": Speed()}
        # Replaced in one step each, for whoever reads them without the lock:
        self.part_bytes = PART_BYTES  # of one read, about
        self.reads_at_once = sys.maxsize  # that keep the disk busy, and no more
        self.writes_at_once = sys.maxsize

    @contextmanager
    def moving(self, kind: Kind, size: int) -> Iterator[None]:
        """While so many bytes are read or written. What fails is not counted."""
        mark = object()
        with self._lock:
            begin = self._clock()
            if not self._active:
                self._since = begin
            self._active[mark] = _Transfer(kind, size, begin, 0.0)
        try:
            yield
        except BaseException:
            size = 0
            raise
        finally:
            with self._lock:
                self._active.pop(mark)
                self._over.append(_Transfer(kind, size, begin, self._clock()))
                self._measure(self._over[-1].end)

    def _measure(self, now: float) -> None:
        """Up to where nothing is under way that began before, it is known how much was moved."""
        known = min((transfer.begin for transfer in self._active.values()), default=now)
        length = known - self._since
        if length <= 0 or (self._active and length < SLICE):
            return
        for kind, size, begin, end in self._over:
            within = min(end, known) - max(begin, self._since)
            if within > 0:
                self._moved[kind] += size * within / (end - begin)
        written = max((transfer.size for transfer in self._over if transfer.kind == "write"), default=0)
        self._over = [transfer for transfer in self._over if transfer.end > known]
        self._since, self._length = known, self._length + length
        if self._length < LEAST:
            return
        kind = "read" if self._moved["read"] >= self._moved["write"] else "write"
        self._speeds[kind].moved(int(sum(self._moved.values())), self._length)
        self._moved, self._length = {"read": 0.0, "write": 0.0}, 0.0
        self._adapt(written)

    def _adapt(self, written: int) -> None:
        """``written``: bytes of the latest writes."""
        reads, writes = self._reads(), self._speeds["write"].line
        if reads is not None and reads.per_byte:
            self.part_bytes = max(1, min(PART_BYTES, int(PART_SECONDS / reads.per_byte)))
            self.reads_at_once = max(FEW_READS, int(READING / reads.per_byte / self.part_bytes))
        if writes is not None and writes.per_byte and written:
            self.writes_at_once = max(1, int(WRITING / writes.per_byte / written))

    def _reads(self) -> Line | None:
        return self._speeds["read"].line or self._speeds["write"].line

    @property
    def writing(self) -> int:
        """Bytes of the writes that are under way."""
        with self._lock:
            return sum(transfer.size for transfer in self._active.values() if transfer.kind == "write")

    @property
    def reads(self) -> Line | None:
        """How quickly it reads; as long as that is not known, how quickly it writes, and None when nothing is."""
        with self._lock:
            return self._reads()

    def gauges(self) -> dict[str, int]:
        """Bytes in a second, 0 when not known, and bytes that are being written."""
        with self._lock:
            lines = {kind: speed.line for kind, speed in self._speeds.items()}
        speeds = {
            f"disk_{kind}_bytes_per_second": int(1 / line.per_byte) if line and line.per_byte else 0
            for kind, line in lines.items()
        }
        return {**speeds, "disk_writing_bytes": self.writing}
