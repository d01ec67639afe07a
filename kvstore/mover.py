"""Bounded worker threads that move bytes: demand before prefetch before save, lower order first among equals."""

from __future__ import annotations

import heapq
import logging
import threading
from collections import Counter
from collections.abc import Callable
from enum import IntEnum
from itertools import count

from kvstore.rates import Rates

log = logging.getLogger("kvstore")

WORKERS = 8  # a few transfers in flight while others take checksums or make a group durable


class Priority(IntEnum):
    """What goes first."""

    DEMAND = 0
    PREFETCH = 1
    SAVE = 2


class Mover:
    """Runs jobs in worker threads, which start with the first job. ``submit`` may be called from any thread."""

    def __init__(self, workers: int = WORKERS, on_error: Callable[[], None] = lambda: None) -> None:
        """``on_error`` is called when a job raised, which is a bug: jobs handle what they expect."""
        self._size = workers
        self._on_error = on_error
        self._ready = threading.Condition()  # guards all fields below
        self._heap: list[tuple[int, tuple[int, ...], int, Callable[[], None]]] = []
        self._tie = count()
        self._threads: list[threading.Thread] = []
        self._running: Counter[int] = Counter()  # jobs, by priority
        self._closed = False
        self.rates = Rates()  # of what the jobs move; has a lock of its own

    def submit(self, priority: Priority, order: tuple[int, ...], job: Callable[[], None]) -> bool:
        """Queues a job; False once the mover is closed."""
        with self._ready:
            if self._closed:
                return False
            heapq.heappush(self._heap, (priority, order, next(self._tie), job))
            if len(self._threads) < self._size and self._running.total() + len(self._heap) > len(self._threads):
                name = f"kvstore-mover-{len(self._threads)}"
                thread = threading.Thread(target=self._run, name=name, daemon=True)
                try:
                    thread.start()
                    self._threads.append(thread)
                except RuntimeError as error:  # those that there are do it, or one that the next job starts
                    log.warning("the system gives no more threads: %s", error)
            self._ready.notify()
            return True

    def close(self) -> None:
        """Drops the jobs that have not started, waits for those that have, joins the threads."""
        with self._ready:
            self._closed = True
            self._heap.clear()
            self._ready.notify_all()
        for thread in self._threads:
            thread.join()

    def _next(self) -> bool:
        """Whether there is a job to begin. Half of the workers are left for what somebody waits for. Locked."""
        if not self._heap:
            return False
        priority = self._heap[0][0]
        if priority == Priority.SAVE:
            return self._running[priority] < max(1, min(self._size // 2, self.rates.writes_at_once))
        return self._running[priority] < self.rates.reads_at_once

    def _run(self) -> None:
        job: Callable[[], None] | None = None
        priority = 0
        while True:
            with self._ready:
                if job is not None:
                    self._running[priority] -= 1
                    self._ready.notify()  # this worker may take something else
                job = None
                while not self._next() and not self._closed:
                    self._ready.wait()
                if not self._heap:
                    return
                priority, _, _, job = heapq.heappop(self._heap)
                self._running[priority] += 1
            try:
                job()
            except Exception:  # top loop: a worker outlives a broken job
                log.exception("a mover job failed")
                self._on_error()
