"""How quickly the disk moves bytes, as measured while it does, and what it is busy with now."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

from kvstore.policies.cost import Line, Speed

# Seconds of work that the disk has at once, and transfers at least. Reads come in the order in which layers are needed,
# which is lost when many share the disk; and they have to wait for writes that are under way.
MOMENTS = {"read": 0.05, "write": 0.5}
PART_SECONDS = 0.02
FEWEST = {"read": 2, "write": 1}
SLICE = 0.25  # seconds of a disk that is never idle that make one measurement, at least

Kind = Literal["read", "write"]


class _Transfer(NamedTuple):
    kind: Kind
    size: int
    begin: float
    end: float


class Rates:
    """Measures a disk that several threads use at once. Any thread.

    A measurement is a stretch in which something was always on its way: all bytes that were moved meanwhile, read and
    written, over its length. It counts for what most of the bytes were.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._lock = threading.Lock()  # guards all fields below
        self._active: dict[object, _Transfer] = {}  # their ends are not known
        self._over: list[_Transfer] = []  # of which a part is in no measurement yet
        self._since = 0.0  # when the stretch began
        self._speeds: dict[Kind, Speed] = {"read": Speed(), "write": Speed()}
        self.part_bytes = sys.maxsize  # of a read that is short enough to wait for; replaced in one step
        self._at_once: dict[Kind, int] = {"read": sys.maxsize, "write": sys.maxsize}

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
        moved = {"read": 0.0, "write": 0.0}
        for kind, size, begin, end in self._over:
            within = min(end, known) - max(begin, self._since)
            if within > 0:
                moved[kind] += size * within / (end - begin)
        self._speeds["read" if moved["read"] >= moved["write"] else "write"].moved(int(sum(moved.values())), length)
        for kind in self._at_once:
            line = self._speeds[kind].line
            size = max((transfer.size for transfer in self._over if transfer.kind == kind), default=0)
            if line is not None and size * line.per_byte:
                self._at_once[kind] = max(FEWEST[kind], int(MOMENTS[kind] / (size * line.per_byte)))
            if kind == "read" and line is not None and line.per_byte:
                self.part_bytes = int(PART_SECONDS / line.per_byte)
        self._over = [transfer for transfer in self._over if transfer.end > known]
        self._since = known

    def at_once(self, kind: Kind) -> int:
        """How many transfers like the latest are to be under way together, so that the disk is busy, and no more."""
        return self._at_once[kind]

    @property
    def writing(self) -> int:
        """Bytes of the writes that are under way."""
        with self._lock:
            return sum(transfer.size for transfer in self._active.values() if transfer.kind == "write")

    @property
    def reads(self) -> Line | None:
        """How quickly it reads; as long as that is not known, how quickly it writes, and None when nothing is."""
        with self._lock:
            return self._speeds["read"].line or self._speeds["write"].line

    def gauges(self) -> dict[str, int]:
        """Bytes in a second, 0 when not known, and bytes that are being written."""
        with self._lock:
            lines = {kind: speed.line for kind, speed in self._speeds.items()}
        speeds = {
            f"disk_{kind}_bytes_per_second": int(1 / line.per_byte) if line and line.per_byte else 0
            for kind, line in lines.items()
        }
        return {**speeds, "disk_writing_bytes": self.writing}
