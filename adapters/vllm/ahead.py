"""What the store is told ahead: which requests wait for the engine, and prompts that will follow (CachedAttention).

What a waiting request will read is brought from disk while others run, and is not evicted before it has started.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from functools import partial
from heapq import nsmallest
from itertools import islice

from kvstore.adapters.vllm.hints import IGNORED, Hint
from kvstore.adapters.vllm.model import Model
from kvstore.adapters.vllm.request import Tracked
from kvstore.adapters.vllm.step import Scope
from kvstore.adapters.vllm.thread import Worker
from kvstore.job import Job
from kvstore.keys import TOKEN_BYTES
from kvstore.match import Match
from kvstore.store import Store

NEAREST = 64  # requests of the queue that the store hears of
HELD = 60.0  # seconds that a prompt which will follow is kept in memory


class Ahead:
    """One per engine. Belongs to the scheduler's thread, which waits for nothing of it."""

    def __init__(self, model: Model, store: Store, timeout: float, by_priority: bool) -> None:
        self._model, self._store, self._timeout, self._by_priority = model, store, timeout, by_priority
        self._told: list[str] = []
        self._lock = threading.Lock()
        self._queue: list[Job] | None = None  # what the thread is yet to tell; guarded by _lock
        self._thread = Worker("kvstore-vllm-ahead")

    def close(self) -> None:
        """Ends the thread."""
        self._thread.close(self._timeout)

    def waiting(self, requests: Iterable[Tracked]) -> None:
        """After each step's choice: those that wait still, in the order in which they came."""
        if self._by_priority:
            nearest = nsmallest(NEAREST, requests, key=lambda tracked: tracked.request.priority)
        else:
            nearest = list(islice(requests, NEAREST))
        names = [tracked.request.request_id for tracked in nearest]
        if names == self._told:
            return
        self._told = names
        for tracked in nearest:
            tracked.jobs = tracked.jobs or tuple(self._jobs(tracked))
        jobs = [job for tracked in nearest for job in tracked.jobs]
        with self._lock:
            idle, self._queue = self._queue is None, jobs  # of several queues, the thread tells of the last
        if idle:
            self._thread.do(self._tell)

    def prefetch(self, scope: Scope, hint: Hint) -> None:
        """Brings a prompt that will follow into memory."""
        self._thread.do(partial(self._prefetch, scope, hint))

    def _jobs(self, tracked: Tracked) -> Iterator[Job]:
        """What a request will read: its prefix, and its segments."""
        name, prompt = tracked.request.request_id, tracked.tokens
        namespace, layout = self._model.namespace(tracked.scope), self._model.layout
        yield Job(name, namespace=namespace, layout=layout, token_ids=prompt)
        for start, stop in tracked.segments:
            chain = prompt[start * TOKEN_BYTES : stop * TOKEN_BYTES]
            yield Job(f"{name}/from {start}", namespace=namespace, layout=layout, token_ids=chain)

    # -- in the thread ------------------------------------------------------------------------------------------------

    def _tell(self) -> None:
        with self._lock:
            jobs, self._queue = self._queue, None
        if jobs is not None:
            self._store.schedule(jobs)

    def _prefetch(self, scope: Scope, hint: Hint) -> None:
        answer = IGNORED  # if what follows fails
        try:
            namespace, layout = self._model.namespace(scope), self._model.layout
            answer = self._bring(self._store.match(namespace, layout, hint.token_ids, whole=True))
        finally:
            hint.answer = answer

    def _bring(self, match: Match) -> str:
        """Pins what was matched to memory, and says what that takes."""
        try:
            if not match.tokens:
                return "unknown"
            near = set(match.tiers) <= {"device", "host"}
            pinned = self._store.pin(match, "host", seconds=HELD)
            return "over budget" if pinned.tokens < match.tokens else "resident" if near else "prefetching"
        finally:
            match.release()
