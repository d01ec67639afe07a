"""What the policy does not admit is not written to a full disk, unless somebody asks for it to be durable."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from blocks import NS, SMALL, found, ids, load_all, recount, save
from gates import MIB, PATIENCE
from queues import SLOTS, counter, flags, jobs, nobody_waits

from kvstore.admission import Admission
from kvstore.files import OsFiles
from kvstore.keys import block_key, token_bytes
from kvstore.local import LocalStore
from kvstore.policies.lru import LRU
from kvstore.policy import Arrival
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.host import HostTier

CHAIN = ids(1, 64)  # of four blocks
FULL = 300  # chains that overflow the disk


class Picky(LRU):
    """Admits what ``wants`` says, of the name under which a block came in; holds its callers to the port's rules."""

    def __init__(self) -> None:
        super().__init__()
        self.wants: Callable[[object], bool] = lambda name: True
        self.asked = 0
        self._names: dict[int, object] = {}
        self._walking = False

    def insert(self, block: int, arrival: Arrival) -> None:
        super().insert(block, arrival)
        self._names[block] = arrival.name

    def admits(self, block: int) -> bool:
        assert not self._walking, "asked while its order was being read"
        assert block in self._order
        self.asked += 1
        return self.wants(self._names[block])

    def victims(self) -> Iterator[int]:
        self._walking = True
        try:
            yield from super().victims()
        finally:
            self._walking = False


@contextmanager
def opened(path: Path, policy: Picky, host: int = MIB) -> Iterator[LocalStore]:
    """A store with a small disk; its accounts must be right at the end."""
    store = LocalStore(HostTier(host), DiskTier(OsFiles(), str(path / "cache"), 6 * MIB), policy, LRU())
    try:
        yield store
        if not store._closed:
            nobody_waits(store)
            assert recount(store) == [] and list(store.verify()) == []
            assert counter(store, "failed_jobs") == 0
    finally:
        store.close()


@contextmanager
def full(path: Path) -> Iterator[tuple[LocalStore, Picky]]:
    """One whose disk is full, and whose policy admits nothing from now on."""
    policy = Picky()
    with opened(path, policy) as store:
        for seed in range(1000, 1000 + FULL):
            save(store, ids(seed, 64)).wait(PATIENCE)
            if counter(store, "disk_evicted_blocks"):
                break
        assert counter(store, "disk_evicted_blocks") > 0
        policy.wants = lambda name: False
        yield store, policy


def written(store: LocalStore) -> None:
    """Waits until nothing is to be written."""
    with store._residency.lock:
        assert store._residency.changed.wait_for(lambda: not store._writer.queued, PATIENCE)


def on_disk(store: LocalStore, tokens: Sequence[int]) -> list[bool]:
    """Of each block that a chain's match finds, whether it is on disk."""
    match, index = found(store, tokens), store._residency.index
    with store._residency.lock:
        return [index.disk[number] != -1 for number, _ in match.blocks]


def push_out(store: LocalStore) -> None:
    """Has everything leave memory that may."""
    for seed in range(1, SLOTS // 4 + 2):
        save(store, ids(9000 + seed, 64))
        written(store)


def test_while_the_disk_has_room_the_policy_is_not_asked(quick: Path) -> None:
    policy = Picky()
    policy.wants = lambda name: False
    with opened(quick, policy) as store:
        assert save(store, CHAIN).tokens == 64
        written(store)
        assert on_disk(store, CHAIN) == [True] * 4
        assert policy.asked == counter(store, "not_admitted_blocks") == 0


def test_what_is_not_admitted_is_served_and_never_written(quick: Path) -> None:
    with full(quick) as (store, _):
        before = counter(store, "disk_written_bytes"), counter(store, "disk_evicted_blocks")
        for seed in range(60):
            tokens = ids(seed, 72)
            assert save(store, tokens).tokens == 72
            assert load_all(store, [*tokens, 0]) == 72
        written(store)
        assert (counter(store, "disk_written_bytes"), counter(store, "disk_evicted_blocks")) == before
        assert counter(store, "not_admitted_blocks") == 60 * 5
        assert counter(store, "host_evicted_blocks") > 60 * 4 - SLOTS
        assert found(store, ids(0, 72)).tokens == 0  # it is lost
        assert on_disk(store, ids(59, 72)) == [False] * 5
        assert counter(store, "failed_writes") == 0


def test_what_is_admitted_is_written_as_ever(quick: Path) -> None:
    with full(quick) as (store, policy):
        policy.wants = lambda name: True
        evicted = counter(store, "disk_evicted_blocks")
        for seed in range(30):
            save(store, ids(seed, 64))
        written(store)
        assert on_disk(store, ids(0, 64)) == [True] * 4
        assert counter(store, "disk_evicted_blocks") > evicted and counter(store, "not_admitted_blocks") == 0


@pytest.mark.parametrize("how", ["wait", "flush", "close"])
def test_durability_that_is_asked_for_is_given(quick: Path, how: str) -> None:
    with full(quick) as (store, _):
        saved = save(store, CHAIN[:60])
        assert on_disk(store, CHAIN[:60]) == [False] * 4
        if how == "wait":
            assert saved.wait(PATIENCE).tokens == 60
        elif how == "flush":
            assert store.flush(PATIENCE)
        store.close()
    with opened(quick, Picky()) as store:
        assert load_all(store, [*CHAIN[:60], 0]) == 60


@pytest.mark.parametrize("how", ["load", "save"])
def test_a_later_use_is_a_new_chance(quick: Path, how: str) -> None:
    with full(quick) as (store, policy):
        save(store, CHAIN)
        load_all(store, [*CHAIN, 0])
        written(store)
        assert on_disk(store, CHAIN) == [False] * 4
        assert counter(store, "not_admitted_blocks") == 4
        policy.wants = lambda name: True
        if how == "load":
            load_all(store, [*CHAIN, 0])
        else:
            save(store, [*CHAIN, *ids(2, 3)])
        written(store)
        assert on_disk(store, CHAIN)[:4] == [True] * 4
        push_out(store)
        assert True not in flags(store, [CHAIN])
        assert load_all(store, [*CHAIN, 0]) == 64


def test_a_block_is_written_with_those_before_it(quick: Path) -> None:
    with full(quick) as (store, policy):
        save(store, CHAIN[:32])
        key = NS.root
        for start in range(0, 48, 16):
            key = block_key(NS, key, token_bytes(CHAIN[start : start + 16]))
        policy.wants = lambda name: name == key
        save(store, CHAIN)
        written(store)
        assert on_disk(store, CHAIN) == [True, True, True, False]
        push_out(store)
        assert load_all(store, [*CHAIN, 0]) == 48


def test_a_tail_that_is_not_admitted_is_let_go_unless_the_disk_has_room_by_then(quick: Path) -> None:
    with full(quick) as (store, _):
        save(store, CHAIN[:9])
        push_out(store)
        assert found(store, CHAIN[:9]).tokens == 0
        save(store, CHAIN[:9])
        residency = store._residency
        with residency.lock:
            for number in list(residency.disk_policy.victims())[:300]:
                residency.drop_disk(number)
        store.forget(owner="nobody")  # what was freed may be written again
        push_out(store)
        written(store)
        assert found(store, CHAIN[:9]).tokens == 9


def test_what_is_kept_on_disk_is_written_whatever_the_policy_says(quick: Path) -> None:
    with full(quick) as (store, _):
        save(store, CHAIN[:40])
        assert store.pin(found(store, CHAIN[:40]), "disk", seconds=60).tokens == 40
        written(store)
        assert on_disk(store, CHAIN[:40]) == [True] * 3
        save(store, CHAIN[:44])  # takes the place of a block that is pinned
        push_out(store)
        written(store)
        assert load_all(store, [*CHAIN[:44], 0]) == 44


def test_what_a_job_will_read_is_admitted(quick: Path) -> None:
    with full(quick) as (store, _):
        save(store, CHAIN)
        store.schedule(jobs([CHAIN]))
        save(store, [*CHAIN, *ids(2, 16)])
        written(store)
        assert on_disk(store, [*CHAIN, *ids(2, 16)]) == [True] * 4 + [False]


def test_what_the_disk_is_worth_is_told(quick: Path) -> None:
    with full(quick) as (store, _):
        said = store.stats()
        counters, gauges = said["counters"], said["gauges"]
        assert counters["saved_bytes"] == counters["saved_tokens"] * SMALL.token_payload
        amplification = gauges["write_amplification"]
        assert amplification == counters["disk_written_bytes"] / counters["saved_bytes"] > 1  # headers, padding
        assert gauges["read_back"] == 0
        load_all(store, [*ids(1030, 64), 0])
        for seed in range(60):
            save(store, ids(seed, 64))
        said = store.stats()
        assert said["gauges"]["write_amplification"] < amplification
        counters = said["counters"]
        assert said["gauges"]["read_back"] == counters["disk_read_bytes"] / counters["disk_written_bytes"] > 0


def _all(admission: Admission, chain: Sequence[int]) -> None:
    for number in chain:
        admission._writer.enqueue(number)


def test_a_store_that_admits_everything_is_found(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Admission, "admit", _all)
    with pytest.raises(AssertionError):
        test_what_is_not_admitted_is_served_and_never_written(quick)
