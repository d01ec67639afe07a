"""Scheduler hints: what waiting jobs will read is brought to host memory ahead, and kept (CachedAttention).

One order, that of the queue, stands behind both: prefetch goes along it as far as memory reaches, and makes room with
what no job needs, or with what stands behind the window.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from kvstore.errors import BadInput
from kvstore.job import Answer, Job
from kvstore.loader import Loader
from kvstore.mover import Mover
from kvstore.outlook import Outlook
from kvstore.policies.windows import Windows
from kvstore.residency import Residency
from kvstore.room import reserve_host
from kvstore.upload import Uploader
from kvstore.waiting import Waiting


class Prefetcher:
    """What the store knows of the queue of waiting jobs. One per store."""

    def __init__(self, residency: Residency, loader: Loader, mover: Mover) -> None:
        self._residency, self._loader, self._mover = residency, loader, mover
        self.uploader = None if residency.hot is None else Uploader(residency, residency.hot, mover)
        self._turn = threading.Lock()  # one call at a time; guards the fields below
        self._queue: dict[object, Waiting] = {}  # by name, as the last call left it
        self._windows = Windows()
        self._kept = 0  # jobs whose blocks are no victims; guarded by residency.lock
        loader.reserve = self._reserve

    def schedule(self, waiting: Sequence[Job]) -> list[Answer]:
        """See ``Store.schedule``."""
        residency = self._residency
        with self._turn:
            queue = self._read(waiting)
            # An engine may tell of the queue before it loads what it took from there: what has left keeps its place for
            # one more call.
            left = [job for name, job in self._queue.items() if name not in queue]
            with residency.lock:
                residency.check_open()
                residency.settle()
                speed, jobs = self._mover.rates.reads, list(queue.values())
                outlook = Outlook(residency, self._loader, self._windows, speed, left, jobs)
                self._kept = outlook.kept
                started = outlook.begin()
                uploads = self.uploader.begin(outlook.chains, outlook.jobs) if self.uploader else ()
                answers = outlook.answers()
            self._queue = queue
            for fetch in started:
                self._loader.submit(fetch, 0)
            if self.uploader is not None:
                self.uploader.submit(uploads)
        return answers

    def _read(self, waiting: Sequence[Job]) -> dict[object, Waiting]:
        """The queue by name, in order."""
        queue: dict[object, Waiting] = {}
        for place, job in enumerate(waiting):
            if not isinstance(job, Job):
                raise BadInput(f"number {place} in the queue is a {type(job).__name__}; give a list of kvstore.Job")
            if job.name in queue:
                raise BadInput(f"two jobs in the queue have the name {job.name!r}; give each its own")
            queue[job.name] = Waiting(job, self._queue.get(job.name))
        return queue

    def _reserve(self, slot_bytes: int) -> int | None:
        """A host slot for a load, which goes before all that only waits: when nothing else may go, then what is kept
        for waiting jobs, the furthest first, and prefetches that have not begun. Locked."""
        residency, loader = self._residency, self._loader
        slot = reserve_host(residency, slot_bytes)
        if slot is None:
            residency.host_policy.protect(0)
            slot = reserve_host(residency, slot_bytes)
            for fetch in reversed(list(loader.fetches.values())):
                if slot is None and loader.take_back(fetch):
                    slot = reserve_host(residency, slot_bytes)
            residency.host_policy.protect(self._kept)
        return slot
