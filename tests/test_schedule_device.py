"""What waiting jobs will read is copied to the device ahead of their loads, where there is room for it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from blocks import WIDE, found, ids, recount, save
from devices import MIB, a_store_with_a_device, asked, heat, recount_device, wrong_on_device
from gates import PATIENCE, Task, fetches_are_over, only_on_disk
from queues import counter, jobs, nobody_waits, states

from kvstore.errors import TierError
from kvstore.hot import Hot
from kvstore.local import LocalStore
from kvstore.policies.lru import LRU
from kvstore.residency import Residency
from kvstore.tensors.streams import Event, ThreadStream
from kvstore.tiers.device import DeviceTier
from kvstore.tiers.host import HostTier
from kvstore.tiers.naive import NaiveDevice

CHAINS = [ids(seed, 32) for seed in range(1, 12)]  # of one block each; the device has room for five, four ahead


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LocalStore]:
    for opened in a_store_with_a_device(tmp_path / "cache"):
        for tokens in CHAINS:
            save(opened, tokens, layout=WIDE)
        yield opened
        if not opened._closed:
            nobody_waits(opened)
            at_rest(opened)


def uploaded(store: LocalStore, blocks: int = 0) -> None:
    """Waits until so many blocks were copied ahead."""
    residency = store._residency
    with residency.lock:
        assert residency.changed.wait_for(lambda: counted(residency) >= blocks, PATIENCE)
    if residency.hot is not None and isinstance(residency.hot.tier, DeviceTier):
        residency.hot.tier._stream("kvstore-upload").record().wait()


def at_rest(store: LocalStore) -> None:
    """Waits until no copy is under way, or about to be."""
    residency = store._residency

    def over() -> bool:
        assert residency.hot is not None and isinstance(residency.hot.tier, DeviceTier)
        residency.hot.tier._stream("kvstore-upload").record().wait()
        residency.settle()
        return not residency.index.leases

    with residency.lock:
        assert residency.changed.wait_for(over, PATIENCE)


def counted(residency: Residency) -> int:
    """Blocks that were, or could not be."""
    counters = residency.counters.snapshot()
    return counters.get("uploaded_blocks", 0) + counters.get("failed_uploads", 0)


def on_device(store: LocalStore) -> list[bool]:
    """Of each chain, whether it is there."""
    return [found(store, tokens, layout=WIDE).tokens_by_tier["device"] == 32 for tokens in CHAINS]


def test_the_next_jobs_find_their_blocks_on_the_device(store: LocalStore) -> None:
    store.schedule(jobs(CHAINS[:2], WIDE))
    uploaded(store, 2)
    answers = store.schedule(jobs(CHAINS[:2], WIDE))
    assert [answer.tokens_by_tier["device"] for answer in answers] == [32, 32] and states(answers) == ["resident"] * 2
    load = asked(store, CHAINS[0])
    assert load.tokens_by_tier(32) == {"device": 32, "host": 0, "disk": 0, "remote": 0}
    assert wrong_on_device(load, CHAINS[0]) == []
    load.release()
    assert counter(store, "uploaded_blocks") == 2


def test_from_disk_to_memory_to_the_device(store: LocalStore) -> None:
    only_on_disk(store)
    assert states(store.schedule(jobs(CHAINS[:1], WIDE))) == ["prefetching"]
    fetches_are_over(store)
    store.schedule(jobs(CHAINS[:1], WIDE))
    uploaded(store, 1)
    only_on_disk(store)
    read = counter(store, "disk_read_bytes")
    assert states(store.schedule(jobs(CHAINS[:1], WIDE))) == ["resident"]
    load = asked(store, CHAINS[0])
    assert wrong_on_device(load, CHAINS[0]) == [] and counter(store, "disk_read_bytes") == read
    load.release()


def test_the_nearest_jobs_have_the_room_and_keep_it(store: LocalStore) -> None:
    for tokens in CHAINS[6:]:
        heat(store, tokens)
    store.schedule(jobs(CHAINS[:6], WIDE))
    uploaded(store, 4)
    assert on_device(store) == [True] * 4 + [False] * 6 + [True]
    store.schedule(jobs(CHAINS[1:6], WIDE))  # the first has left, and keeps its place until the next call
    assert on_device(store)[:6] == [True] * 4 + [False] * 2
    store.schedule(jobs(CHAINS[1:6], WIDE))
    uploaded(store, 5)
    assert on_device(store) == [True] * 5 + [False] * 6
    heat(store, CHAINS[5])  # who loads makes room with what nobody waits for, then with what is furthest
    assert on_device(store)[:6] == [False] + [True] * 5
    heat(store, CHAINS[6])
    assert on_device(store)[:7] == [False] + [True] * 4 + [False, True]


def test_jobs_that_are_there_make_no_room_for_those_behind_them(store: LocalStore) -> None:
    running = [asked(store, tokens) for tokens in CHAINS[6:8]]  # they have two of the five slots
    for _ in range(3):
        store.schedule(jobs(CHAINS[:6], WIDE))
        uploaded(store, 3)
    assert on_device(store)[:6] == [True] * 3 + [False] * 3 and counter(store, "uploaded_blocks") == 3
    for load in running:
        load.release()


class Held(DeviceTier):
    """A device whose uploads wait at a gate."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity, "cpu")
        self.gate = threading.Event()
        self.asked = threading.Event()

    def _wait(self) -> None:
        self.gate.wait(PATIENCE)

    def upload(self, address: int, source: memoryview) -> Event:
        if not self.asked.is_set():
            stream = self._stream("kvstore-upload")
            assert isinstance(stream, ThreadStream)
            stream.run(self._wait)
        event = super().upload(address, source)
        self.asked.set()
        return event


def held(tokens: Sequence[int]) -> tuple[LocalStore, Held]:
    """A store in memory with an upload of this chain that is held up."""
    tier = Held(MIB)
    store = LocalStore(HostTier(8 * MIB), None, LRU(), LRU(), hot=Hot(tier, LRU()))
    save(store, tokens, layout=WIDE, owner="me")
    store.schedule(jobs([tokens], WIDE))
    assert tier.asked.wait(PATIENCE)
    return store, tier


def test_who_loads_meanwhile_reads_behind_the_copy() -> None:
    store, tier = held(CHAINS[0])
    with store:
        assert store.stats()["leases"] == 1  # memory stays as it is until the copy is over
        load = asked(store, CHAINS[0])
        reader = ThreadStream("kvstore-test")
        load.ready(reader)
        read = list[list[str]]()
        reader.run(lambda: read.append(wrong_on_device(load, CHAINS[0])))
        assert not reader.record().done()
        tier.gate.set()
        reader.close()
        assert read == [[]]
        load.release()
        nobody_waits(store)
        at_rest(store)
        assert recount(store) == recount_device(store) == []


def test_what_is_forgotten_during_the_copy_is_erased_behind_it() -> None:
    store, tier = held(CHAINS[0])
    with store:
        assert store._residency.hot is not None
        (slot,) = store._residency.hot._slots.values()
        forgetting = Task(lambda: store.forget(owner="me"))
        forgetting.join(0.05)
        assert forgetting.is_alive()
        tier.gate.set()
        assert forgetting.result().deferred == 1  # in memory, as long as the copy reads it
        nobody_waits(store)
        at_rest(store)
        assert found(store, CHAINS[0], layout=WIDE).tokens == 0
        assert counter(store, "device_erased_blocks") == 1 and recount_device(store) == []
        assert not slot.memory.any()


def test_the_store_closes_behind_a_copy_that_is_held_up() -> None:
    store, tier = held(CHAINS[0])
    closing = Task(store.close)
    closing.join(0.05)
    assert closing.is_alive() and store._residency.host._memory
    tier.gate.set()
    closing.result()


class Failing(NaiveDevice):
    """A device that takes nothing."""

    def upload(self, address: int, source: memoryview) -> Event:
        raise TierError("the test said so")


def test_a_device_that_takes_nothing_costs_nothing() -> None:
    tier = Failing(2 * MIB)
    with LocalStore(HostTier(8 * MIB), None, LRU(), LRU(), hot=Hot(tier, LRU())) as store:
        save(store, CHAINS[0], layout=WIDE)
        store.schedule(jobs(CHAINS[:1], WIDE))
        uploaded(store, 1)
        assert store.stats()["leases"] == 0
        assert counter(store, "failed_uploads") == 1 and counter(store, "uploaded_blocks") == 0 and not tier.used
