"""Scheduler hints on the real store: what waiting jobs will read is there when they start, and costs nobody else."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
from blocks import NS, SMALL, found, ids, load_all, recount, save, wrong
from gates import MIB, PATIENCE, fetches_are_over, only_on_disk
from queues import CHAINS, SHARE, SLOTS, counter, flags, job, jobs, scheduled, states

import kvstore
from kvstore import Answer, BadInput, Job
from kvstore.rates import Rates


def test_what_waiting_jobs_will_read_is_there_when_they_start(tmp_path: Path) -> None:
    with scheduled(tmp_path, CHAINS[:8]) as (store, _):
        first = store.schedule(jobs(CHAINS[:8]))
        assert states(first) == ["prefetching"] * 8
        assert first[0] == Answer(CHAINS[0][0], "prefetching", 64, {"device": 0, "host": 0, "disk": 64, "remote": 0})
        fetches_are_over(store)
        again = store.schedule(jobs(CHAINS[:8]))
        assert states(again) == ["resident"] * 8
        assert again[7].tokens_by_tier == {"device": 0, "host": 64, "disk": 0, "remote": 0}
        read = counter(store, "disk_read_bytes")
        for place, tokens in enumerate(CHAINS[:8]):
            store.schedule(jobs(CHAINS[place + 1 : 8]))
            assert load_all(store, [*tokens, 0]) == 64
        assert counter(store, "disk_read_bytes") == read
        assert counter(store, "prefetched_blocks") == counter(store, "prefetch_used_blocks") == 32
        assert counter(store, "prefetched_bytes") == 32 * 16 * SMALL.token_payload
        assert counter(store, "prefetch_wasted_blocks") == 0


def test_without_hints_the_same_jobs_read_from_disk(tmp_path: Path) -> None:
    """The control of the test above."""
    with scheduled(tmp_path, CHAINS[:8]) as (store, _):
        read = counter(store, "disk_read_bytes")
        assert load_all(store, [*CHAINS[0], 0]) == 64
        assert counter(store, "disk_read_bytes") > read


def test_the_window_is_what_memory_holds_and_nobody_in_it_is_pushed_out(tmp_path: Path) -> None:
    with scheduled(tmp_path, CHAINS) as (store, _):
        window = SHARE // 4
        for _ in range(3):
            answers = store.schedule(jobs(CHAINS))
            assert set(states(answers[:window])) <= {"prefetching", "resident"}
            assert set(states(answers[window:])) == {"too far"}
            fetches_are_over(store)
        assert counter(store, "prefetched_blocks") == SHARE
        assert states(store.schedule(jobs(CHAINS))) == ["resident"] * window + ["too far"] * (len(CHAINS) - window)


def test_prefetch_makes_room_with_what_stands_furthest_back(tmp_path: Path) -> None:
    with scheduled(tmp_path, CHAINS[:25]) as (store, _):
        store.schedule(jobs(CHAINS[4:20]))
        fetches_are_over(store)
        loads = [store.load(found(store, tokens)) for tokens in CHAINS[20:25]]  # one free slot is left
        fetches_are_over(store)
        store.schedule(jobs(CHAINS[:20]))
        fetches_are_over(store)
        assert flags(store, CHAINS[:20]) == [True] * (80 - 15) + [False] * 15
        for load in loads:
            load.release()


def test_under_pressure_the_furthest_job_loses_its_tail_first(tmp_path: Path) -> None:
    with scheduled(tmp_path, CHAINS[:28]) as (store, _):
        store.schedule(jobs(CHAINS[:16]))
        fetches_are_over(store)
        loads = []
        for number, tokens in enumerate(CHAINS[16:28]):
            loads.append(store.load(found(store, tokens)))  # what is loaded goes before what waits
            gone = max(0, 4 * (number + 1) - (SLOTS - SHARE))
            assert flags(store, CHAINS[:16]) == [True] * (64 - gone) + [False] * gone
        assert gone == 27
        for load, tokens in zip(loads, CHAINS[16:28], strict=True):
            assert load.tokens == 64 and wrong(load, tokens) == []
            load.release()


def test_jobs_in_the_window_survive_a_flood_of_saves(tmp_path: Path) -> None:
    with scheduled(tmp_path, CHAINS[:16]) as (store, _):
        store.schedule(jobs(CHAINS[:16]))
        fetches_are_over(store)
        evicted = counter(store, "host_evicted_blocks")
        for seed in range(100, 160):
            save(store, ids(seed, 64))  # some are short: what is not written yet cannot go
        assert states(store.schedule(jobs(CHAINS[:16]))) == ["resident"] * 16
        store.flush()
        for seed in range(200, 230):
            assert save(store, ids(seed, 64)).wait(PATIENCE).tokens == 64
        assert states(store.schedule(jobs(CHAINS[:16]))) == ["resident"] * 16
        assert counter(store, "host_evicted_blocks") > evicted + SLOTS


def test_what_has_left_the_queue_is_still_there_for_its_load(tmp_path: Path) -> None:
    with scheduled(tmp_path, CHAINS[:18]) as (store, _):
        store.schedule(jobs(CHAINS[:16]))
        fetches_are_over(store)
        read = counter(store, "disk_read_bytes")
        assert states(store.schedule(jobs(CHAINS[1:17])))[-1] == "over budget"
        load_all(store, [*CHAINS[0], 0])
        assert counter(store, "disk_read_bytes") == read
        assert states(store.schedule(jobs(CHAINS[1:17])))[-1] == "prefetching"


def test_what_nobody_came_for_goes_first(tmp_path: Path) -> None:
    with scheduled(tmp_path, CHAINS[:21]) as (store, _):
        for tokens in CHAINS[:19]:
            load_all(store, [*tokens, 0])
        store.schedule(jobs(CHAINS[19:21]))
        fetches_are_over(store)
        assert flags(store, CHAINS[:21]) == [True] * 84
        store.schedule([])
        store.schedule([])
        assert counter(store, "prefetch_wasted_blocks") == 8
        held = [store.draft(SMALL) for _ in range(9)]
        assert all(held) and flags(store, CHAINS[:21]) == [True] * 76 + [False] * 8
        del held


def test_who_comes_after_all_finds_it(tmp_path: Path) -> None:
    """The control of the test above: what is used is like anything else."""
    with scheduled(tmp_path, CHAINS[:21]) as (store, _):
        for tokens in CHAINS[:19]:
            load_all(store, [*tokens, 0])
        store.schedule(jobs(CHAINS[19:21]))
        fetches_are_over(store)
        store.schedule([])
        store.schedule([])
        for tokens in CHAINS[19:21]:
            load_all(store, [*tokens, 0])
        held = [store.draft(SMALL) for _ in range(9)]
        assert all(held) and flags(store, CHAINS[:21]) == [False] * 8 + [True] * 76
        del held


def test_priority_says_who_gets_memory_first(tmp_path: Path) -> None:
    long = [ids(seed, 40 * 16) for seed in (90, 91)]
    with scheduled(tmp_path, long) as (store, _):
        small = [job("c", CHAINS[0]), job("d", CHAINS[1])]
        for tokens in CHAINS[:2]:
            save(store, tokens[:16]).wait(PATIENCE)  # so that the mean is small, and the long ones are in the window
        answers = store.schedule([job("a", long[0]), job("b", long[1]), *small])
        assert states(answers)[:2] == ["prefetching", "over budget"]
        fetches_are_over(store)
        assert flags(store, long) == [True] * SHARE + [False] * (80 - SHARE)  # what there is room for is there
        store.schedule([])
        store.schedule([])
        only_on_disk(store)
        answers = store.schedule([job("a", long[0]), job("b", long[1], priority=1), *small])
        assert states(answers)[:2] == ["over budget", "prefetching"]
        fetches_are_over(store)
        assert flags(store, long) == [True] * (SHARE - 40) + [False] * (80 - SHARE) + [True] * 40


def test_what_cannot_be_there_by_its_deadline_is_not_begun(tmp_path: Path) -> None:
    now = 0.0
    rates = Rates(clock=lambda: now)
    for size in (MIB, 2 * MIB, 4 * MIB, 8 * MIB):
        with rates.moving("read", size):
            now += size / MIB
    with scheduled(tmp_path, CHAINS[:3]) as (store, _):
        assert states(store.schedule([job("a", CHAINS[0], deadline=0.0)])) == ["too far"]
        assert states(store.schedule([job("a", CHAINS[0], deadline=1e-9)])) == ["prefetching"]  # nothing is known yet
        fetches_are_over(store)
        store._mover.rates = rates  # a disk of a MiB in a second
        assert states(store.schedule([job("b", CHAINS[1], deadline=0.01)])) == ["too far"]
        assert states(store.schedule([job("b", CHAINS[1], deadline=1.0)])) == ["prefetching"]


def test_answers_say_what_is_stored(tmp_path: Path) -> None:
    with scheduled(tmp_path, CHAINS[:2]) as (store, _):
        save(store, CHAINS[2][:40])
        answers = store.schedule([job("a", CHAINS[2]), job("b", CHAINS[3]), job("c", CHAINS[0])])
        assert [(a.name, a.state, a.tokens) for a in answers] == [
            ("a", "resident", 40),
            ("b", "unknown", 0),
            ("c", "prefetching", 64),
        ]
        assert store.schedule([]) == []


def test_a_store_in_memory_keeps_what_is_waited_for() -> None:
    with kvstore.open(host="1MiB") as store:
        for tokens in CHAINS[:4]:
            save(store, tokens)
        assert states(store.schedule(jobs(CHAINS[:4]))) == ["resident"] * 4
        for seed in range(100, 140):
            save(store, ids(seed, 64))
        assert states(store.schedule(jobs(CHAINS[:5]))) == ["resident"] * 4 + ["unknown"]
        store.schedule([])
        store.schedule([])
        assert recount(store) == []


def test_a_job_may_be_a_match(tmp_path: Path) -> None:
    with scheduled(tmp_path, CHAINS[:2]) as (store, _):
        match = store.match(NS, SMALL, [*CHAINS[0], 0], first=32)
        whole = found(store, CHAINS[1])
        answers = store.schedule([Job("a", match), Job("b", whole)])
        assert [(a.state, a.tokens) for a in answers] == [("prefetching", 32), ("prefetching", 64)]
        fetches_are_over(store)
        assert counter(store, "prefetched_blocks") == 6
        assert flags(store, CHAINS[:1]) == [False, False, True, True]
        load = store.load(whole)
        assert load.tokens_by_tier(64)["host"] == 64
        load.release()
        assert states(store.schedule([Job("a", match)])) == ["resident"]
        match.release()
        with pytest.raises(BadInput, match="released"):
            store.schedule([Job("a", match)])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Job("a"), "match"),
        (lambda: Job("a", namespace=NS, layout=SMALL), "token_ids"),
        (lambda: Job(cast(Any, ["a"]), namespace=NS, layout=SMALL, token_ids=[1]), "hashable"),
        (lambda: job("a", CHAINS[0], start=float("nan")), "start"),
        (lambda: job("a", CHAINS[0], deadline="soon"), "deadline"),
        (lambda: job("a", CHAINS[0], priority=None), "priority"),
        (lambda: [job("a", CHAINS[0]), job("a", CHAINS[1])], "two jobs"),
        (lambda: [CHAINS[0]], "kvstore.Job"),
        (lambda: [Job("a", namespace=NS, layout=SMALL, token_ids=[-1])], "token ids"),
    ],
)
def test_what_the_caller_can_mend_is_said(make: Any, said: str) -> None:
    with kvstore.open(host="1MiB") as store, pytest.raises(BadInput, match=said):
        store.schedule(make())


def test_a_number_that_stands_for_another_block_is_not_kept(tmp_path: Path) -> None:
    with scheduled(tmp_path, CHAINS[:1]) as (store, _):
        save(store, CHAINS[1], owner="me").wait(PATIENCE)
        only_on_disk(store)
        before = {number for number, _ in found(store, CHAINS[1]).blocks}
        assert states(store.schedule([job("a", CHAINS[1], deadline=0.0)])) == ["too far"]
        store.forget(owner="me")
        save(store, CHAINS[2]).wait(PATIENCE)
        again = {number for number, _ in found(store, CHAINS[2]).blocks}
        assert again == before
        with store._residency.lock:
            assert again == set(store._residency.host_policy.victims())
