"""The budget of host memory, made smaller and larger while the store is used."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from blocks import SMALL, WIDE, found, ids, load_all, recount, save, wrong
from gates import MIB, PATIENCE, gated
from kept import kept_faults

import kvstore
from kvstore import BadInput
from kvstore.budget import over
from kvstore.load import Load
from kvstore.local import LocalStore

ROOM = 2 * MIB + 64 * 1024  # for two extents and a little more
CHAINS = [ids(seed, 64) for seed in range(400)]  # of four blocks of 12 KiB each


@pytest.fixture(params=["memory", "disk"])
def store(request: pytest.FixtureRequest, quick: Path) -> Iterator[LocalStore]:
    """One of eight extents of 1 MiB, that must be right at the end."""
    with kvstore.open(quick / "cache" if request.param == "disk" else None, host=8 * MIB, disk=64 * MIB) as opened:
        yield opened
        assert recount(opened) == [] and kept_faults(opened) == [] and lost_slots(opened) == []


def lost_slots(store: LocalStore) -> list[int]:
    """Extents of memory some of whose slots are neither free nor in use."""
    slab = store._residency.host.slab
    return [one.number for one in slab.extents.values() if len(one.free) + len(one.live) != one.slots]


def filled(store: LocalStore) -> None:
    """More than it holds, and all of it written where there is a disk."""
    for chain in CHAINS:
        save(store, chain).wait(PATIENCE)
    assert store.flush(PATIENCE)


def held(store: LocalStore) -> set[int]:
    """Chains that are in memory from end to end."""
    there = set()
    for place, chain in enumerate(CHAINS):
        match = found(store, chain)
        if match.tokens_by_tier["host"] == 64:
            there.add(place)
        match.release()
    return there


def test_what_is_worth_least_goes_and_no_byte_over_the_budget_stays(store: LocalStore) -> None:
    filled(store)
    before = held(store)
    assert len(before) > 120 and store.stats()["tiers"]["host"]["used"] > 7 * MIB
    assert store.resize(ROOM) <= ROOM
    said = store.stats()["tiers"]["host"]
    assert said["capacity"] == ROOM and ROOM - MIB < said["used"] <= ROOM
    after = held(store)
    assert after and after < before
    assert said["blocks"] > 160  # moved together: the extents that are left are full
    for place in random.Random(3).sample(sorted(after), 10):
        assert load_all(store, [*CHAINS[place], 0]) == 64
    filled(store)
    assert store.stats()["tiers"]["host"]["used"] <= ROOM


def test_the_latest_chains_stay(quick: Path) -> None:
    """Under a policy whose order is plain, across extents that all hold some of them."""
    with gated(quick / "cache", 8 * MIB) as (store, _):
        for chain in CHAINS:
            save(store, chain).wait(PATIENCE)
        assert min(held(store)) < 240
        for chain in CHAINS[240:400:5]:  # some in every extent
            found(store, chain).release()
        store.resize(ROOM)
        assert set(range(240, 400, 5)) <= held(store)


def test_it_grows(store: LocalStore) -> None:
    store.resize(2 * MIB)
    filled(store)
    assert len(held(store)) < 43
    assert store.resize(8 * MIB) <= 2 * MIB
    for chain in CHAINS:
        load_all(store, [*chain, 0])
        save(store, chain)
    assert len(held(store)) > 120
    assert store.stats()["tiers"]["host"]["used"] <= 8 * MIB


def test_nothing_that_is_leased_is_touched_and_the_rest_goes_when_it_is_let_go(store: LocalStore) -> None:
    filled(store)
    loads: dict[int, Load] = {}
    for place in sorted(held(store))[::4]:  # a few in every extent
        loads[place] = store.load(found(store, CHAINS[place]))
    places = {
        place: [store._residency.residents[source.number].address for source in load.sources]
        for place, load in loads.items()
    }
    assert store.resize(MIB, timeout=0.0) > 4 * MIB
    assert save(store, ids(5000, 64)).wait(PATIENCE) is not None  # serves on, with what it has
    assert store.stats()["tiers"]["host"]["used"] > 4 * MIB
    for place, load in loads.items():
        assert [store._residency.residents[source.number].address for source in load.sources] == places[place]
        assert wrong(load, CHAINS[place]) == []
        load.release()
    assert store.stats()["tiers"]["host"]["used"] <= MIB
    del load


def test_a_lease_that_ends_in_time_is_waited_for(store: LocalStore) -> None:
    filled(store)
    match = found(store, CHAINS[-1])
    timer = threading.Timer(0.1, match.release)
    timer.start()
    assert store.resize(1 * MIB, PATIENCE) <= 1 * MIB
    timer.join()


def test_drafts_stay_until_they_are_saved(store: LocalStore) -> None:
    filled(store)
    drafts = [store.draft(SMALL) for _ in range(4)]
    assert all(drafts)
    store.resize(1 * MIB, timeout=0.0)
    assert store.stats()["drafts"] == 4
    drafts.clear()
    assert store.stats()["tiers"]["host"]["used"] <= MIB


def test_what_is_nowhere_else_goes_when_it_is_written(quick: Path) -> None:
    with gated(quick / "cache", 4 * MIB) as (store, tier):
        gate = tier.gate("write", 1000)
        for chain in CHAINS[:200]:
            save(store, chain[:8])
        assert store.resize(MIB, timeout=0.0) > MIB
        assert store.stats()["tiers"]["host"]["blocks"] == 200 and lost_slots(store) == []
        gate.open()
        assert store.resize(MIB, PATIENCE) <= MIB
        assert all(load_all(store, [*chain[:8], 0]) == 8 for chain in CHAINS[:200])


def test_what_is_pinned_moves_and_stays(store: LocalStore) -> None:
    filled(store)
    pinned = sorted(held(store))[::8]
    for place in pinned:
        assert store.pin(found(store, CHAINS[place]), seconds=60).tokens == 64
    assert store.resize(3 * MIB) <= 3 * MIB
    assert set(pinned) <= held(store)
    for place in pinned:
        assert load_all(store, [*CHAINS[place], 0]) == 64
    with pytest.raises(BadInput, match="pins keep"):
        store.resize(1 * MIB)
    assert store.stats()["tiers"]["host"]["capacity"] == 3 * MIB
    more = store.pin(found(store, CHAINS[pinned[0]]), seconds=60)  # the bound of pins has become smaller, too
    assert more.tokens == 64 and kept_faults(store) == []


def test_what_is_retained_counts_where_there_is_no_disk() -> None:
    with kvstore.open(host=8 * MIB) as store:
        filled(store)
        for place in sorted(held(store))[::5]:
            assert store.retain(found(store, CHAINS[place]), seconds=60).tokens == 64
        with pytest.raises(BadInput, match="pins keep"):
            store.resize(3 * MIB)
        assert store.resize(7 * MIB) <= 7 * MIB


def test_two_classes_of_slots(store: LocalStore) -> None:
    for seed in range(12):
        save(store, ids(7000 + seed, 64), layout=WIDE)
        save(store, CHAINS[seed])
    assert store.flush(PATIENCE)
    assert store.resize(2 * MIB) <= 2 * MIB
    for seed in range(12):
        load_all(store, [*ids(7000 + seed, 64), 0], layout=WIDE)
        load_all(store, [*CHAINS[seed], 0])


def test_what_cannot_be_had_changes_nothing(store: LocalStore) -> None:
    with pytest.raises(BadInput, match="memory here"):
        store.resize(1 << 60)
    assert store.stats()["tiers"]["host"]["capacity"] == 8 * MIB


def test_under_traffic(store: LocalStore) -> None:
    """Sizes go up and down while others save and load; every byte is right, and in the end it fits."""
    filled(store)
    stop = threading.Event()
    faults: list[object] = []

    def traffic(seed: int) -> None:
        draw = random.Random(seed)
        try:
            while not stop.is_set():
                chain = draw.choice(CHAINS)
                save(store, chain)
                load_all(store, [*chain, 0])
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=traffic, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for size in (2, 6, 1, 8, 3, 1, 5, 2):
        store.resize(size * MIB, timeout=0.2)
    stop.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert not faults
    assert store.resize(2 * MIB) <= 2 * MIB
    with store._residency.lock:
        assert not over(store._residency)
