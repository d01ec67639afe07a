"""Prefetches under way: who overtakes, joins, cancels, forgets, fails or closes meanwhile."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import pytest
from blocks import NS, found, ids, load_all, save, wrong
from faulty_files import FaultyFiles
from gates import MIB, PATIENCE, Task, fetches_are_over, gated, only_on_disk
from queues import CHAINS, SHARE, SLOTS, counter, job, jobs, scheduled, states

import kvstore
from kvstore import Job, LayerShape, Layout, StoreClosed
from kvstore.mover import WORKERS, Priority


def test_a_load_gets_the_memory_that_is_kept_for_the_queue(tmp_path: Path) -> None:
    long = ids(99, 40 * 16)
    with scheduled(tmp_path, [*CHAINS[:16], long]) as (store, tier):
        gate = tier.gate("read", WORKERS)
        store.schedule(jobs(CHAINS[:16]))
        gate.reached(WORKERS)
        load = store.load(found(store, long))  # in place of prefetches that have not begun
        assert load.tokens == len(long)
        assert counter(store, "prefetch_cancelled_blocks") == 40 - (SLOTS - SHARE)
        gate.open()
        assert wrong(load, long) == []
        load.release()
        assert "loads_cut" not in store.stats()["counters"]
        again = store.schedule(jobs(CHAINS[:16]))
        assert "too far" not in states(again) and "prefetching" in states(again)


def test_cancelled_jobs_release_what_has_not_begun(tmp_path: Path) -> None:
    with scheduled(tmp_path, CHAINS[:11]) as (store, tier):
        gate = tier.gate("read", WORKERS)
        store.schedule(jobs(CHAINS[:11]))
        gate.reached(WORKERS)
        assert store.stats()["leases"] == 44
        store.schedule([])
        assert store.stats()["leases"] == WORKERS
        gate.open()
        fetches_are_over(store)
        assert counter(store, "prefetch_cancelled_blocks") == 44 - WORKERS
        assert counter(store, "prefetched_blocks") == WORKERS
        assert counter(store, "failed_reads") == 0
        assert load_all(store, [*CHAINS[10], 0]) == 64


def test_a_load_overtakes_prefetches_and_joins_its_own(tmp_path: Path) -> None:
    with scheduled(tmp_path, CHAINS[:11]) as (store, tier):
        gate = tier.gate("read", WORKERS)
        store.schedule(jobs(CHAINS[:11]))
        gate.reached(WORKERS)
        load = store.load(found(store, CHAINS[10]))  # the last in the queue
        theirs = {number for number, _ in found(store, CHAINS[10]).blocks}
        behind = tier.gate("read", WORKERS)
        gate.open()
        behind.reached(WORKERS)
        waiting = {number for number, fetch in store._loader.fetches.items() if not fetch._begun}
        assert len(waiting) == 44 - 2 * WORKERS and not theirs & waiting
        behind.open()
        assert wrong(load, CHAINS[10]) == [] and load.tokens == 64
        load.release()
        fetches_are_over(store)
        assert tier.calls["read"] == 44  # nothing is read twice
        assert counter(store, "prefetch_used_blocks") == 4


PARTS = Layout((LayerShape(8, 128, 128),) * 6, "float32", block_tokens=64)  # 3 MiB: layer 0, four layers, one


@pytest.mark.parametrize("part", [0, 1])
def test_each_part_is_read_once_however_often_it_is_asked_for(tmp_path: Path, part: int) -> None:
    with gated(tmp_path, host=16 * MIB) as (store, tier):
        tokens = ids(1, 64)
        save(store, tokens, layout=PARTS)
        only_on_disk(store)
        first = tier.gate("read")
        if part:
            store._mover._size = 1  # so that the third part has not begun when the second stands at its gate
        store.schedule([Job("a", namespace=NS, layout=PARTS, token_ids=[*tokens, 0])])
        first.reached()
        gate = tier.gate("read") if part else first
        first.open()
        if part:
            gate.reached()
        load = store.load(found(store, tokens, layout=PARTS))
        if part:
            assert [entry[0] for entry in sorted(store._mover._heap)] == [Priority.DEMAND, Priority.PREFETCH]
        gate.open()
        assert wrong(load, tokens) == []
        load.release()
        fetches_are_over(store)
        assert tier.calls["read"] == 3


def test_reads_go_in_the_order_in_which_jobs_start(tmp_path: Path) -> None:
    with scheduled(tmp_path, CHAINS[:6]) as (store, tier):
        gate = tier.gate("read", WORKERS)
        starts = [0.0, None, 50.0, None, 10.0, None]  # without a time: with the job before it
        store.schedule([job(n, CHAINS[n], start=start) for n, start in enumerate(starts)])
        gate.reached(WORKERS)
        behind = tier.gate("read", WORKERS)
        gate.open()
        behind.reached(WORKERS)
        waiting = {number for number, fetch in store._loader.fetches.items() if not fetch._begun}
        assert waiting == {number for tokens in CHAINS[2:4] for number, _ in found(store, tokens).blocks}
        behind.open()


def test_a_block_that_cannot_be_read_is_a_miss_for_its_job_alone(tmp_path: Path) -> None:
    with scheduled(tmp_path, CHAINS[:8]) as (store, tier):
        tier.fail("read")
        store.schedule(jobs(CHAINS[:8]))
        fetches_are_over(store)
        answers = store.schedule(jobs(CHAINS[:8]))
        assert sorted(answer.tokens for answer in answers)[1:] == [64] * 7
        (short,) = (answer for answer in answers if answer.tokens < 64)
        assert {answer.state for answer in answers if answer is not short} == {"resident"}
        tokens = next(tokens for tokens in CHAINS if tokens[0] == short.name)
        assert load_all(store, [*tokens, 0]) == short.tokens
        assert counter(store, "failed_reads") == 1 and counter(store, "prefetched_blocks") == 31


def test_damage_is_found_before_a_job_starts(tmp_path: Path) -> None:
    files = FaultyFiles()
    with gated(tmp_path, files=files) as (store, _):
        save(store, CHAINS[0]).wait(PATIENCE)
        only_on_disk(store)

        def rot(_: object, buffer: memoryview, __: int) -> None:
            buffer[len(buffer) - 4000] ^= 1

        files.rot = rot
        assert states(store.schedule(jobs(CHAINS[:1]))) == ["prefetching"]
        fetches_are_over(store)
        files.heal()
        assert states(store.schedule(jobs(CHAINS[:1]))) == ["unknown"]
        assert counter(store, "corrupt_blocks") == 4


def test_a_store_closes_with_prefetches_under_way(tmp_path: Path) -> None:
    with scheduled(tmp_path / "cache", CHAINS[:11]) as (store, tier):
        gate = tier.gate("read", WORKERS)
        store.schedule(jobs(CHAINS[:11]))
        gate.reached(WORKERS)
        closing = Task(store.close)
        closing.join(0.05)
        gate.open()
        closing.result()
        assert not {"failed_reads", "corrupt_blocks", "failed_jobs"} & store._residency.counters.snapshot().keys()
        with pytest.raises(StoreClosed):
            store.schedule([])
    with kvstore.open(tmp_path / "cache", host="8MiB", disk="64MiB") as again:
        assert [found(again, tokens).tokens for tokens in CHAINS[:11]] == [64] * 11


def test_what_is_forgotten_while_it_is_prefetched_does_not_come_back(tmp_path: Path) -> None:
    with scheduled(tmp_path, CHAINS[:1]) as (store, tier):
        save(store, CHAINS[1], owner="me").wait(PATIENCE)
        only_on_disk(store)
        gate = tier.gate("read", WORKERS)
        store.schedule(jobs(CHAINS[:2]))
        gate.reached(WORKERS)
        assert store.forget(owner="me").deferred == 4
        assert states(store.schedule(jobs(CHAINS[:2]))) == ["prefetching", "unknown"]
        gate.open()
        fetches_are_over(store)
        assert states(store.schedule(jobs(CHAINS[:2]))) == ["resident", "unknown"]
        assert found(store, CHAINS[1]).tokens == 0


def test_schedule_load_save_and_forget_at_the_same_time(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    with scheduled(tmp_path, CHAINS[:24]) as (store, _):

        def schedules(draw: random.Random) -> None:
            for _ in range(150):
                queue = draw.sample(CHAINS, draw.randrange(20))
                for answer in store.schedule([job(t[0], t, priority=draw.randrange(2)) for t in queue]):
                    assert answer.tokens == sum(answer.tokens_by_tier.values())

        def loads(draw: random.Random) -> None:
            for _ in range(150):
                load_all(store, [*draw.choice(CHAINS), 0])

        def saves(draw: random.Random) -> None:
            for number in range(100):
                save(store, draw.choice(CHAINS) if number % 2 else ids(draw.randrange(1000, 1040), 70), owner="some")
                if number % 20 == 19:
                    store.forget(owner="some")

        tasks = [Task(partial(work, random.Random(draw.random()))) for work in (schedules, schedules, loads, saves)]
        for task in tasks:
            task.result()
        assert not {"failed_reads", "corrupt_blocks"} & store.stats()["counters"].keys()


def served(path: Path, requests: list[list[int]], queue: int) -> list[tuple[int, int]]:
    """Each request's tokens that were found, and the bytes that its load read from disk."""
    done = []
    with gated(path, host=MIB) as (store, _):
        for number, tokens in enumerate(requests):
            if queue:
                store.schedule([job(number + n, each) for n, each in enumerate(requests[number : number + queue])])
                fetches_are_over(store)
            read = counter(store, "disk_read_bytes")
            load = store.load(found(store, tokens))
            assert wrong(load, tokens) == []
            done.append((load.tokens, counter(store, "disk_read_bytes") - read))
            load.release()
            save(store, tokens).wait(PATIENCE)
    return done


def test_with_hints_no_job_finds_less_or_waits_for_more(tmp_path: Path, seed: int) -> None:
    draw, talks, requests = random.Random(seed), [ids(seed, 32)] * 12, list[list[int]]()
    for number in range(60):
        talk = draw.randrange(len(talks))
        talks[talk] = talks[talk] + ids(number, draw.randrange(20, 70))
        requests.append(talks[talk])
    without, hinted = served(tmp_path / "without", requests, 0), served(tmp_path / "hinted", requests, 8)
    assert all(after[0] >= before[0] and after[1] <= before[1] for before, after in zip(without, hinted, strict=True))
    assert sum(read for _, read in without) > 10 * sum(read for _, read in hinted)
