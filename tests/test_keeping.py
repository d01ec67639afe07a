"""Pins: who stays, how long, and how much of it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from blocks import NS, SMALL, found, ids, load_all, save
from gates import MIB, PATIENCE, fetches_are_over, gated, only_on_disk
from kept import CHAIN, HALF, OTHER, clock, counted, counted_behind_gates, flood, kept
from queues import counter, flags, jobs, states

import kvstore
from kvstore.keeping import FEW_ENDED, Keeping
from kvstore.local import LocalStore


@pytest.fixture(params=["memory", "disk"])
def store(request: pytest.FixtureRequest, quick: Path) -> Iterator[LocalStore]:
    with counted(quick if request.param == "disk" else None) as opened:
        yield opened


@pytest.fixture
def on_disk(quick: Path) -> Iterator[LocalStore]:
    with counted_behind_gates(quick) as opened:
        yield opened


@pytest.fixture
def small(quick: Path) -> Iterator[LocalStore]:
    """One whose disk holds less than half of what a flood brings."""
    with counted_behind_gates(quick, 2 * MIB, 6 * MIB) as opened:
        yield opened


def test_what_is_pinned_survives_a_flood_that_evicts_the_rest(store: LocalStore) -> None:
    for tokens in (CHAIN, OTHER):
        save(store, tokens).wait()
    pinned = store.pin(found(store, CHAIN), seconds=60)
    assert (pinned.asked, pinned.tokens, pinned.tier, pinned.why) == (64, 64, "host", "")
    assert str(pinned) == "64 of 64 tokens stay in host memory until 60 seconds after their last use"
    assert kept(store)["host"] == 4
    flood(store)
    assert flags(store, [CHAIN]) == [True] * 4
    assert True not in flags(store, [OTHER])
    assert load_all(store, [*CHAIN, 0]) == 64
    pinned.release()
    pinned.release()
    assert kept(store)["host"] == 0
    flood(store, first=2000)
    assert True not in flags(store, [CHAIN])


def test_a_pin_needs_no_handle(store: LocalStore) -> None:
    save(store, CHAIN).wait()
    store.pin(found(store, CHAIN), seconds=60)
    gc.collect()
    flood(store)
    assert flags(store, [CHAIN]) == [True] * 4


def test_what_is_pinned_on_disk_stays_there_and_not_in_memory(small: LocalStore) -> None:
    for tokens in (CHAIN, OTHER):
        save(small, tokens)
    pinned = small.pin(found(small, CHAIN), "disk", seconds=60)
    assert pinned.tokens == 64
    flood(small, 200)
    assert counter(small, "disk_evicted_blocks") > 0
    assert flags(small, [CHAIN]) == [False] * 4
    assert load_all(small, [*CHAIN, 0]) == 64
    assert found(small, OTHER).tokens == 0


def test_a_partial_block_that_is_pinned_on_disk_is_written(on_disk: LocalStore) -> None:
    save(on_disk, CHAIN[:40])
    on_disk.pin(found(on_disk, CHAIN[:40]), "disk", seconds=60)
    with on_disk._residency.lock:
        assert on_disk._residency.changed.wait_for(lambda: not on_disk._writer.queued, PATIENCE)
    assert on_disk.stats()["tiers"]["disk"]["blocks"] == 3


def test_what_is_only_on_disk_is_brought(on_disk: LocalStore) -> None:
    save(on_disk, CHAIN)
    only_on_disk(on_disk)
    match = found(on_disk, CHAIN)
    assert on_disk.pin(match, "host", seconds=60).tokens == 64
    match.release()
    fetches_are_over(on_disk)
    assert flags(on_disk, [CHAIN]) == [True] * 4
    read = counter(on_disk, "disk_read_bytes")
    assert read >= 4 * 16 * SMALL.token_payload
    assert load_all(on_disk, [*CHAIN, 0]) == 64 and counter(on_disk, "disk_read_bytes") == read
    assert not on_disk._loader.ahead  # nobody took it for a prefetch


def test_a_load_hurries_what_a_pin_is_about_to_bring(on_disk: LocalStore) -> None:
    save(on_disk, CHAIN)
    only_on_disk(on_disk)
    gate = cast(Any, on_disk._residency.disk).gate("read", 4)
    on_disk.pin(found(on_disk, CHAIN), seconds=60)
    gate.reached()
    waiting = list(on_disk._loader.fetches.values())
    assert [fetch.turn(0)[1][0] for fetch in waiting] == [1] * 4  # behind all that loads wait for
    load = on_disk.load(found(on_disk, CHAIN[:32]))
    assert [fetch.turn(0)[1][0] for fetch in waiting] == [0, 0, 1, 1]
    gate.open()
    assert load.wait(1)
    load.release()
    fetches_are_over(on_disk)


def test_a_pin_lives_from_use_to_use_and_not_for_ever(store: LocalStore) -> None:
    now = clock(store)
    save(store, CHAIN)
    pinned = store.pin(found(store, CHAIN), seconds=10)
    assert pinned.until == 1010.0
    now[0] = 1009.0
    found(store, CHAIN[:32])
    now[0] = 1010.0
    assert kept(store)["host"] == 2  # the rest was not used
    for when in range(1018, 1100, 9):
        now[0] = when
        assert kept(store)["host"] == 2
        found(store, CHAIN)
    assert counter(store, "expired_pins") == 0
    now[0] = 1099.9
    assert kept(store)["host"] == 2
    now[0] = 1100.0
    assert kept(store)["host"] == 0 and counter(store, "expired_pins") == 1
    store.pin(found(store, CHAIN), seconds=10)
    now[0] = 1109.0
    assert kept(store)["host"] == 4
    flood(store)
    assert flags(store, [CHAIN]) == [True] * 4


def test_what_stands_before_a_match_is_pinned_and_used_with_it(store: LocalStore) -> None:
    now = clock(store)
    save(store, CHAIN).wait()
    part = store.match(NS, SMALL, [*CHAIN, 0], first=32)
    pinned = store.pin(part, seconds=10)
    assert (pinned.tokens, kept(store)["host"]) == (64, 4)
    now[0] = 1009.0
    store.match(NS, SMALL, [*CHAIN, 0], first=48).release()
    now[0] = 1011.0
    part.release()
    flood(store)
    assert flags(store, [CHAIN]) == [True] * 4


def test_pins_take_half_of_a_tier_leading_tokens_first(store: LocalStore) -> None:
    long = ids(3, 60 * 16)
    save(store, long).wait()
    save(store, CHAIN).wait()
    pinned = store.pin(found(store, long), seconds=60)
    assert (pinned.asked, pinned.tokens) == (60 * 16, HALF * 16)
    assert str(pinned).endswith("but no more: pins may take 524288 bytes of host memory")
    assert store.pin(found(store, CHAIN), seconds=60).tokens == 0
    flood(store)
    assert flags(store, [long])[:HALF] == [True] * HALF and True not in flags(store, [long])[HALF:]
    assert True not in flags(store, [CHAIN])
    pinned.release()
    save(store, CHAIN).wait()
    assert store.pin(found(store, CHAIN), seconds=60).tokens == 64


def test_pins_on_the_same_blocks_count_once_and_end_apart(store: LocalStore) -> None:
    now = clock(store)
    save(store, CHAIN)
    first, second = (store.pin(found(store, CHAIN), seconds=seconds) for seconds in (10, 20))
    third = store.pin(found(store, CHAIN[:20]), seconds=30)
    assert (third.tokens, kept(store)["host"]) == (20, 4)
    first.release()
    assert kept(store)["host"] == 4
    now[0] = 1020.0
    assert kept(store)["host"] == 2
    third.release()
    second.release()
    assert kept(store)["host"] == 0


def test_with_half_pinned_and_the_rest_leased_saves_are_short_and_nothing_fails(store: LocalStore) -> None:
    long = ids(3, 40 * 16)
    save(store, long).wait()
    store.pin(found(store, long), seconds=60)
    held = []
    for seed in range(100, 150):
        save(store, ids(seed, 64))
        held.append(found(store, ids(seed, 64)))
    assert len(store.drafts(SMALL, 5)) < 5
    assert save(store, CHAIN).tokens < 64
    for match in held:
        match.release()
    store.flush()
    assert save(store, CHAIN).tokens == 64


def test_what_jobs_wait_for_and_what_is_pinned_leave_room_for_saves(on_disk: LocalStore) -> None:
    chains = [ids(seed, 64) for seed in range(10, 40)]
    for tokens in chains:
        save(on_disk, tokens).wait()
    only_on_disk(on_disk)
    for tokens in chains[20:30]:
        assert on_disk.pin(found(on_disk, tokens), seconds=60).tokens == 64
    answers = on_disk.schedule(jobs(chains[:20]))
    assert states(answers).count("prefetching") == 6  # three quarters of memory, less what is pinned
    fetches_are_over(on_disk)
    assert flags(on_disk, chains[20:30]) == [True] * 40
    assert len(on_disk.drafts(SMALL, 20)) == 20


def test_neither_pins_nor_retentions_survive_a_restart(quick: Path) -> None:
    with kvstore.open(quick / "cache", host=MIB, disk="64MiB") as store:
        save(store, CHAIN)
        store.pin(found(store, CHAIN), seconds=1000)
        store.retain(found(store, CHAIN), 1000)
    with kvstore.open(quick / "cache", host=MIB, disk="64MiB") as store:
        assert set(kept(store).values()) == {0}
        assert load_all(store, [*CHAIN, 0]) == 64
        flood(store)
        assert True not in flags(store, [CHAIN])


def test_a_pin_ends_with_its_blocks(store: LocalStore) -> None:
    save(store, CHAIN, owner="me").wait()
    pinned = store.pin(found(store, CHAIN), seconds=60)
    store.retain(found(store, CHAIN), 60)
    assert store.forget(owner="me").blocks == 4
    assert set(kept(store).values()) == {0}
    save(store, CHAIN).wait()  # the numbers are in use again
    flood(store)
    assert True not in flags(store, [CHAIN])
    pinned.release()


def test_what_supersedes_a_block_takes_over_its_pins(store: LocalStore) -> None:
    save(store, CHAIN[:40])
    store.pin(found(store, CHAIN[:40]), seconds=60)
    save(store, CHAIN[:44]).wait()
    save(store, CHAIN).wait()
    assert counter(store, "superseded_blocks") == 2
    assert kept(store)["host"] == 3
    flood(store)
    assert flags(store, [CHAIN])[:3] == [True] * 3


def test_pins_that_come_and_go_leave_nothing_behind(store: LocalStore) -> None:
    save(store, CHAIN)
    match = found(store, CHAIN)
    last = store.pin(match, seconds=1e6)
    for _ in range(10 * FEW_ENDED):
        store.pin(match, seconds=1e6).release()
    last.release()
    assert len(store._residency.keeping._heap) <= 2 * FEW_ENDED


def _never(*arguments: Any) -> bool:
    return False


PLANTED = {
    "nothing stays": (Keeping, "stays", _never, test_what_is_pinned_survives_a_flood_that_evicts_the_rest),
    "uses are not seen": (Keeping, "use", _never, test_a_pin_lives_from_use_to_use_and_not_for_ever),
    "time does not pass": (Keeping, "expire", _never, test_a_pin_lives_from_use_to_use_and_not_for_ever),
    "what is gone is kept": (Keeping, "gone", _never, test_a_pin_ends_with_its_blocks),
    "pins do not pass on": (Keeping, "pass_on", _never, test_what_supersedes_a_block_takes_over_its_pins),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_fault_is_found(planted: str, quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, fault, test = PLANTED[planted]
    monkeypatch.setattr(owner, name, fault)
    with gated(quick / "cache", host=MIB) as (store, _), pytest.raises(AssertionError):
        test(store)
