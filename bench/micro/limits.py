"""What the machine can do: memcpy with n threads, and plain transfers to the disk. And fair interleaved medians."""

from __future__ import annotations

import ctypes
import mmap
import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvstore.block import address_of


@dataclass(frozen=True, slots=True)
class Timing:
    """Medians of interleaved repeats: seconds of the limit and of the thing, and CPU seconds of both."""

    limit: float
    seconds: float
    limit_cpu: float
    cpu: float
    low: float  # quartiles of the ratio
    high: float

    @property
    def ratio(self) -> float:
        """How near the limit: 1.0 is as fast as the limit."""
        return self.limit / self.seconds

    @property
    def spread(self) -> float:
        """Interquartile range of the ratio."""
        return self.high - self.low

    @property
    def times(self) -> float:
        """How many times as long as the limit: the ratio, the other way up."""
        return self.seconds / self.limit

    @property
    def times_spread(self) -> float:
        """Interquartile range of ``times``."""
        return 1 / self.low - 1 / self.high


def compare(
    limit: Callable[[], object],
    thing: Callable[[], object],
    repeats: int,
    prepare: Callable[[], object] = lambda: None,
) -> Timing:
    """Runs both in turns; the ratio is the median of the ratios of neighbours, so that noise meets both."""
    limit(), prepare(), thing()  # warm
    rows: list[tuple[float, float, float, float]] = []
    for _ in range(repeats):
        a, a_cpu = timed(limit)
        prepare()
        b, b_cpu = timed(thing)
        rows.append((a, b, a_cpu, b_cpu))
    ratios = [a / b for a, b, _, _ in rows]
    seconds = statistics.median(b for _, b, _, _ in rows)
    low, _, high = statistics.quantiles(ratios, n=4)
    cpu = [statistics.median(row[i] for row in rows) for i in (2, 3)]
    return Timing(statistics.median(ratios) * seconds, seconds, cpu[0], cpu[1], low, high)


def timed(thing: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds (all threads of the process) of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    thing()
    return time.perf_counter() - wall, time.process_time() - cpu


def memory(size: int) -> memoryview:
    """Page-aligned memory whose pages are mapped already."""
    mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    view = memoryview(mapping)
    ctypes.memset(address_of(view), 1, size)
    return view


def copy(target: memoryview, source: memoryview, step: int) -> None:
    """memcpy in units of ``step`` bytes."""
    to, of = address_of(target), address_of(source)
    for start in range(0, len(source), step):
        ctypes.memmove(to + start, of + start, min(step, len(source) - start))


def in_threads(work: Sequence[Callable[[], object]]) -> None:
    """Runs the calls at the same time, one thread each, and waits for all."""
    if len(work) == 1:
        work[0]()
        return
    threads = [threading.Thread(target=call, name=f"bench-{i}") for i, call in enumerate(work)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class PlainFile:
    """A preallocated file, written and read with O_DIRECT where that is possible, ``flight`` transfers at a time.

    It goes round through ``rounds`` regions, so that it touches as much of the disk as the store beside it.
    """

    def __init__(self, path: Path, size: int, rounds: int) -> None:
        self.path = path
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_DIRECT", 0)
        self._fd = os.open(path, flags, 0o600)
        self._size, self._rounds, self._round = size, rounds, 0
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self._fd, 0, size * rounds)

    def write(self, buffers: Sequence[memoryview], flight: int) -> None:
        """Writes the buffers one behind the other, then syncs."""
        self._run(buffers, flight, lambda view, offset: os.pwrite(self._fd, view, offset))
        os.fdatasync(self._fd)

    def read(self, buffers: Sequence[memoryview], flight: int) -> None:
        """Reads into the buffers."""
        self._run(buffers, flight, lambda view, offset: os.preadv(self._fd, [view], offset))

    def _run(self, buffers: Sequence[memoryview], flight: int, move: Callable[[memoryview, int], int]) -> None:
        size, start = len(buffers[0]), self._round * self._size
        self._round = (self._round + 1) % self._rounds

        def worker(first: int) -> None:
            for i in range(first, len(buffers), flight):
                done = move(buffers[i], start + i * size)
                assert done == size, "a plain transfer was cut short"

        in_threads([lambda first=first: worker(first) for first in range(flight)])  # type: ignore[misc]

    def close(self) -> None:
        """Removes the file."""
        os.close(self._fd)
        self.path.unlink()
