"""The simulator: what a cache does with a request, the optimum against all others, and the public figures."""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import random
from collections.abc import Generator, Sequence
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import pytest

from kvstore.bench.simulate import readers, summary
from kvstore.bench.simulate.cache import Cache
from kvstore.bench.simulate.minimum import Minimum
from kvstore.bench.simulate.requests import Request, Trace
from kvstore.bench.simulate.sweep import Job, Server, simulate, sweep
from kvstore.policies.lru import LRU
from kvstore.policies.named import POLICIES
from kvstore.policy import Arrival, Clock

BLOCK = 4
CAPACITIES = (0.01, 0.05, 0.2)


@pytest.fixture(autouse=True, scope="module")
def tracker() -> None:
    """What multiprocessing starts once and keeps is there before any test looks for leaks."""
    resource_tracker.ensure_running()


def request_of(*blocks: int, time: float = 0.0, last: int = BLOCK) -> Request:
    """Whole blocks, the last one of so many tokens."""
    return Request(time, BLOCK * (len(blocks) - 1) + last, blocks)


def trace_of(requests: Sequence[Request]) -> Trace:
    return Trace("drawn", "mooncake", BLOCK, tuple(requests))


def forest(draw: random.Random, blocks: int, requests: int) -> list[Request]:
    """Requests for nodes of a random forest, each with all that is before it."""
    chains: list[tuple[int, ...]] = []
    for block in range(blocks):
        before = draw.choice([(), *chains]) if chains else ()
        chains.append((*before, block))
    return [request_of(*draw.choice(chains), time=float(at)) for at in range(requests)]


def sessions(seed: int, requests: int = 400) -> Trace:
    """Conversations that grow behind two system prompts, with short last blocks."""
    draw, fresh = random.Random(seed), itertools.count(10)
    open_ends: list[tuple[int, ...]] = [(0,), (1, 2)] * 6
    found = []
    for at in range(requests):
        one = draw.randrange(len(open_ends))
        if draw.random() < 0.2:
            open_ends[one] = draw.choice([(0,), (1, 2)])
        open_ends[one] = (*open_ends[one], *(next(fresh) for _ in range(draw.randrange(1, 4))))
        last = draw.randrange(1, BLOCK)
        found.append(request_of(*open_ends[one], next(fresh), time=float(at), last=last))
    return trace_of(found)


def hits(server: Server, requests: Sequence[Request]) -> int:
    return sum(server.serve(request) for request in requests)


# -- one request in a cache -------------------------------------------------------------------------------------------


class Recording(LRU):
    """LRU that writes down what it is told, and when."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.calls: list[Any] = []

    def insert(self, block: int, arrival: Arrival) -> None:
        self.calls.append(("insert", block, arrival, self.clock()))
        super().insert(block, arrival)

    def touch(self, chain: Sequence[int]) -> None:
        self.calls.append(("touch", list(chain), self.clock()))
        super().touch(chain)

    def arrange(self, chain: Sequence[int], served: bool = False) -> None:
        self.calls.append(("arrange", list(chain), served))
        LRU.touch(self, chain)

    def remove(self, block: int) -> None:
        self.calls.append(("remove", block))
        super().remove(block)


def recorded(capacity: int) -> tuple[Cache, list[Any]]:
    policies: list[Recording] = []

    def make(clock: Clock) -> Recording:
        policies.append(Recording(clock))
        return policies[0]

    return Cache(make, capacity, BLOCK), policies[0].calls


def test_a_policy_sees_a_request_as_the_store_shows_it() -> None:
    cache, calls = recorded(3)
    assert cache.serve(request_of(70, 71, time=5.0, last=2)) == 0
    assert calls == [
        ("touch", [], 5.0),
        ("insert", 0, Arrival(4, 4, 70, -1), 5.0),
        ("insert", 1, Arrival(2, 2, 71, 0), 5.0),
        ("arrange", [0, 1], True),
    ]
    calls.clear()
    assert cache.serve(request_of(70, 72, 73, time=6.5)) == 1
    assert calls == [
        ("touch", [0], 6.5),
        ("insert", 2, Arrival(4, 4, 72, 0), 6.5),
        ("insert", 3, Arrival(4, 4, 73, 2), 6.5),
        ("arrange", [0, 2, 3], True),
        ("remove", 1),
    ]
    assert (cache.stored, cache.evictions) == (4, 1)


def test_what_just_came_may_go_too() -> None:
    cache, calls = recorded(2)
    assert cache.serve(request_of(1, 2, 3, 4)) == 0
    assert calls[-3:] == [("arrange", [0, 1, 2, 3], True), ("remove", 3), ("remove", 2)]
    assert cache.serve(request_of(1, 2, 3, 4)) == 2


def test_one_token_is_left_to_compute() -> None:
    whole, short = request_of(1, 2), request_of(1, 2, last=1)
    cache = Cache(POLICIES["lru"], 8, BLOCK)
    assert [cache.serve(whole), cache.serve(whole)] == [0, 2]
    assert [whole.hit_tokens(blocks, BLOCK) for blocks in range(3)] == [0, 4, 7]
    assert [short.hit_tokens(blocks, BLOCK) for blocks in range(3)] == [0, 4, 4]


def test_what_is_known_to_come_stays(seed: int) -> None:
    requests = sessions(seed).requests
    plain, told = Cache(POLICIES["lru"], 12, BLOCK), Cache(POLICIES["lru"], 12, BLOCK)
    found = sum(told.serve(request, requests[at : at + 8]) for at, request in enumerate(requests))
    assert hits(plain, requests) < found <= hits(Minimum(requests, 12), requests)


# -- the optimum ------------------------------------------------------------------------------------------------------


def most_hits(requests: Sequence[Request], capacity: int) -> int:
    """Over all contents that a cache could have after each request. Full ones only: to hold more never costs a hit."""
    best: dict[frozenset[int], int] = {frozenset(): 0}
    for request in requests:
        after: dict[frozenset[int], int] = {}
        for held, found in best.items():
            found += len(list(itertools.takewhile(held.__contains__, request.blocks)))
            may = held.union(request.blocks)
            for kept in map(frozenset, itertools.combinations(may, min(capacity, len(may)))):
                after[kept] = max(after.get(kept, 0), found)
        best = after
    return max(best.values())


def test_the_optimum_equals_an_exhaustive_search(seed: int) -> None:
    """And LRU does not: were the search or the forests too easy, it would."""
    draw, worse = random.Random(seed), 0
    for _ in range(300):
        requests, capacity = forest(draw, draw.randrange(3, 9), draw.randrange(4, 13)), draw.randrange(1, 5)
        best = most_hits(requests, capacity)
        assert hits(Minimum(requests, capacity), requests) == best, (requests, capacity)
        lru = hits(Cache(POLICIES["lru"], capacity, BLOCK), requests)
        assert lru <= best
        worse += lru < best
    assert worse > 30


def test_the_optimum_bounds_every_policy_and_grows_with_capacity(seed: int) -> None:
    requests = sessions(seed).requests
    everything = len({block for request in requests for block in request.blocks})
    found = [hits(Minimum(requests, capacity), requests) for capacity in (1, 5, 20, 80, everything)]
    assert found == sorted(found) and found[0] < found[2] < found[4]
    for name, make in POLICIES.items():
        assert hits(Cache(make, 20, BLOCK), requests) <= found[2], name
    endless = hits(Cache(POLICIES["lru"], everything, BLOCK), requests)
    assert endless == found[4]


# -- sweeps -----------------------------------------------------------------------------------------------------------


def without_time(outcome: Any) -> dict[str, Any]:
    return {key: value for key, value in vars(outcome).items() if key != "seconds"}


def test_processes_find_what_one_finds(seed: int) -> None:
    trace = sessions(seed)
    jobs = [Job(name, share) for name in ("default", "pace", "lru", "min") for share in (0.02, 0.1)]
    found = {outcome.job: outcome for outcome in sweep(trace, jobs)}
    assert found.keys() == set(jobs)
    for job, outcome in found.items():
        assert without_time(outcome) == without_time(simulate(trace, job))
    assert found[jobs[0]].seconds == found[jobs[2]].seconds  # two names of one policy, simulated once
    assert multiprocessing.active_children() == []


def test_an_interrupted_sweep_leaves_nothing_behind(seed: int) -> None:
    trace = sessions(seed, 2000)
    running = sweep(trace, [Job(name, 0.1, ahead) for ahead in range(9) for name in ("min", "best-of")])
    assert next(running).token_hit_ratio > 0
    assert isinstance(running, Generator)
    with pytest.raises(KeyboardInterrupt):
        running.throw(KeyboardInterrupt())
    assert multiprocessing.active_children() == []


def test_the_warm_up_is_not_counted() -> None:
    same = [request_of(1, 2, 3, time=float(at)) for at in range(4)]
    cold, warm = (simulate(trace_of(same), Job("lru", 1.0, warm_up=share)) for share in (0.0, 0.25))
    assert (cold.token_hit_ratio, warm.token_hit_ratio) == (33 / 48, 33 / 36)
    assert (cold.block_hit_ratio, warm.block_hit_ratio) == (9 / 12, 1.0)
    last = simulate(trace_of(same), Job("min", 1.0, warm_up=math.nextafter(1, 0)))
    assert last.token_hit_ratio == 11 / 12
    assert (warm.blocks, warm.stored, warm.evictions) == (3, 3, 0)


def test_shares_of_the_optimum(seed: int) -> None:
    trace = sessions(seed)
    outcomes = [simulate(trace, Job(name, share)) for name in ("min", "lru") for share in (0.5, 0.02)]
    result = summary.summarize(trace, outcomes, ["lru"])
    ratios = {(one.job.policy, one.job.capacity): one.token_hit_ratio for one in outcomes}
    assert [(one["policy"], one["capacity"]) for one in result["results"]] == [("lru", 0.02), ("lru", 0.5)]
    for one in result["results"]:
        assert one["share_of_min"] == pytest.approx(ratios["lru", one["capacity"]] / ratios["min", one["capacity"]])
    assert 0 < result["results"][0]["share_of_min"] < result["results"][1]["share_of_min"] <= 1
    assert summary.summarize(trace_of([request_of(1)]), outcomes, ["min"])["results"][0]["share_of_min"] == 1.0
    json.dumps(result)


# -- public traces ----------------------------------------------------------------------------------------------------


def percent_of(trace: Trace, *policies: str) -> list[list[float]]:
    """Token hits of each policy, by capacity."""
    jobs = [Job(policy, share) for policy in policies for share in CAPACITIES]
    found = {outcome.job: round(100 * outcome.token_hit_ratio, 2) for outcome in sweep(trace, jobs)}
    return [[found[Job(policy, share)] for share in CAPACITIES] for policy in policies]


def test_the_public_trace_has_its_published_figures(traces: Path) -> None:
    trace = readers.read(traces / "conversation_trace.jsonl")
    assert (trace.format, len(trace.requests), trace.unique_blocks) == ("mooncake", 12031, 182790)
    assert (trace.arrivals, trace.skipped) == ("recorded", 0)
    best, lru = percent_of(trace, "min", "lru")
    assert best == [25.12, 37.36, 37.36]
    assert lru == [5.35, 19.96, 35.21]


def test_drawn_arrivals_are_like_those_of_a_known_load(traces: Path) -> None:
    """LRU on the tool-calling chats, as others drew their arrivals: hits, and shares of the optimum."""
    trace = readers.read(traces / "tau_airline_gpt4o_trajectories.json")
    assert (trace.format, len(trace.requests), trace.arrivals) == ("chat", 2654, "drawn, seed 0")
    best, lru = percent_of(trace, "min", "lru")
    assert lru == pytest.approx([52.8, 73.7, 92.8], abs=2.1)
    shares = [100 * one / two for one, two in zip(lru, best, strict=True)]
    assert shares == pytest.approx([84, 85, 100], abs=1.5)
