"""Requests that wait for a model, first come, first served; and what the store is told of them."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

from kvstore.adapters.transformers.request import QueueFull, Request
from kvstore.adapters.transformers.tempo import Tempo
from kvstore.errors import ForkError, StoreClosed
from kvstore.job import Job
from kvstore.keys import Namespace


class Queue:
    """At most ``room`` requests, in the order in which they came. Any thread, but for ``tell``: one at a time.

    The store knows of one queue only, so there is one for each store.
    """

    def __init__(self, reuse: Any, room: int) -> None:
        self._reuse, self._room = reuse, room
        self._changed = threading.Condition()  # guards the fields below
        self._requests: deque[Request] = deque()
        self._told = True  # the store knows the queue as it is
        self._closed = False

    def add(self, request: Request) -> None:
        """Queues it. Raises ``QueueFull``, ``StoreClosed`` for a closed queue, ``BadInput`` for what it asks."""
        self._job(request, None, request.deadline)
        with self._changed:
            if self._closed:
                raise StoreClosed("the loop is closed and takes no more requests; make a new one")
            if len(self._requests) >= self._room:
                raise QueueFull(f"{self._room} requests wait already; come back later, or give a larger max_waiting")
            self._requests.append(request)
            self._told = False
            self._changed.notify_all()

    def head(self) -> Request | None:
        """The request that is next."""
        with self._changed:
            return self._requests[0] if self._requests else None

    def remove(self, request: Request) -> bool:
        """Takes it out; False when it is not there, or not any more."""
        with self._changed:
            if request not in self._requests:
                return False
            self._requests.remove(request)
            self._told = False
            return True

    def remove_late(self) -> list[Request]:
        """Takes out those whose deadline has passed."""
        with self._changed:
            late = [one for one in self._requests if one.deadline is not None and one.waited >= one.deadline]
        return [request for request in late if self.remove(request)]

    def wait(self, busy: bool) -> bool:
        """Blocks until a request waits, unless the caller is ``busy``; False: the queue was closed."""
        with self._changed:
            self._changed.wait_for(lambda: busy or self._requests or self._closed)
            return not self._closed

    def close(self) -> list[Request]:
        """Takes no more; those that still waited."""
        with self._changed:
            left = list(self._requests)
            self._requests.clear()
            self._closed, self._told = True, self._told and not left
            self._changed.notify_all()
        return left

    @property
    def closed(self) -> bool:
        """Whether it takes no more."""
        return self._closed

    def __len__(self) -> int:
        return len(self._requests)

    # -- what the store is told ---------------------------------------------------------------------------------------

    def tell(self, tempo: Tempo, running: Sequence[int], active: int) -> None:
        """Passes the queue to the store, if it is not as it was; see ``Tempo.starts``."""
        with self._changed:
            if self._told:
                return
            self._told = True
            waiting = list(self._requests)
        starts = tempo.starts(running, [request.max_new_tokens for request in waiting], active)
        jobs = [
            self._job(request, start, request.deadline and request.deadline - request.waited)
            for request, start in zip(waiting, starts, strict=True)
        ]
        with contextlib.suppress(StoreClosed, ForkError):  # who loads from this store is told so
            self._reuse.schedule(jobs)

    def _job(self, request: Request, start: float | None, deadline: float | None) -> Job:
        return Job(
            request,
            namespace=Namespace(self._reuse.fingerprint, request.tenant),
            layout=self._reuse.layout,
            token_ids=request.prompt,
            start=start,
            priority=request.priority,
            deadline=deadline,
        )
