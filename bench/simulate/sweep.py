"""Every policy at every capacity over one trace, on all processors that this process may use."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from typing import Any, Protocol

from kvstore.bench.simulate.cache import Cache
from kvstore.bench.simulate.minimum import Minimum
from kvstore.bench.simulate.requests import Request, Trace
from kvstore.policies.named import POLICIES

MINIMUM = "min"


class Server(Protocol):
    """A cache that serves requests in order."""

    @property
    def evictions(self) -> int:
        """Blocks that went."""

    @property
    def stored(self) -> int:
        """Blocks that came in."""

    def serve(self, request: Request, queue: Sequence[Request] = ()) -> int:
        """How many leading blocks are there. ``queue``: what is known to come, the nearest first."""


@dataclass(frozen=True)
class Job:
    """One policy at one capacity, a share of the trace's different blocks."""

    policy: str
    capacity: float
    look_ahead: int = 0  # requests that are known to come, that which is served among them
    warm_up: float = 0.0  # share of the requests, from the first on, that are not counted


@dataclass(frozen=True)
class Outcome:
    """What came of a job, without what its warm-up saw; ``evictions`` and ``stored`` are of all requests."""

    job: Job
    blocks: int  # of the cache
    token_hit_ratio: float
    block_hit_ratio: float
    evictions: int
    stored: int
    seconds: float


def simulate(trace: Trace, job: Job) -> Outcome:
    """Serves the whole trace. A cache has room for one block at least."""
    began = time.perf_counter()
    capacity = max(1, int(job.capacity * trace.unique_blocks))
    server: Server = (
        Minimum(trace.requests, capacity)
        if job.policy == MINIMUM
        else Cache(POLICIES[job.policy], capacity, trace.block_tokens)
    )
    requests = trace.requests
    first = min(int(job.warm_up * len(requests)), len(requests) - 1)
    hits = hit_tokens = blocks = tokens = 0
    for number, request in enumerate(requests):
        hit = server.serve(request, requests[number : number + job.look_ahead])
        if number >= first:
            hits, blocks = hits + hit, blocks + len(request.blocks)
            hit_tokens, tokens = hit_tokens + request.hit_tokens(hit, trace.block_tokens), tokens + request.tokens
    seconds = time.perf_counter() - began
    return Outcome(job, capacity, hit_tokens / tokens, hits / blocks, server.evictions, server.stored, seconds)


def sweep(trace: Trace, jobs: Iterable[Job]) -> Iterator[Outcome]:
    """The outcomes, as they come; what has two names is simulated once. Interrupted, it leaves no process behind."""
    alike: dict[Any, list[Job]] = {}
    for job in jobs:
        alike.setdefault((POLICIES.get(job.policy), replace(job, policy="")), []).append(job)
    workers = min(_processors(), len(alike))
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start, (trace,))
    try:
        futures = {pool.submit(_simulate, same[0]): same for same in alike.values()}
        for done in as_completed(futures):
            outcome = done.result()
            yield from (replace(outcome, job=job) for job in futures[done])
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_trace: Trace  # of this worker


def _start(trace: Trace) -> None:
    """A worker begins. The parent ends it, not the keyboard."""
    global _trace
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _trace = trace


def _simulate(job: Job) -> Outcome:
    return simulate(_trace, job)
