"""What meets what, made to happen at the worst moment: a real disk tier whose calls wait at gates."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
from blocks import NS, SMALL, drafts, found, ids, load_all, recount, save, wrong
from gates import MIB, GatedTier, Task, fetches_are_over, gated, only_on_disk

import kvstore
from kvstore import StoreClosed
from kvstore.local import LocalStore
from kvstore.mover import WORKERS

TOKENS = ids(1, 64)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[LocalStore, GatedTier]]:
    """A store, and its tier behind gates; its accounts must be right at the end."""
    with gated(tmp_path / "cache") as (store, tier):
        yield store, tier
        if not store._closed:
            store.flush()
            assert recount(store) == []


def test_a_block_that_is_forgotten_while_it_is_fetched(pair: tuple[LocalStore, GatedTier]) -> None:
    store, tier = pair
    save(store, TOKENS, owner="a")
    only_on_disk(store)
    gate = tier.gate("read", 4)
    load = store.load(found(store, TOKENS))
    gate.reached(4)
    receipt = store.forget(owner="a")
    assert (receipt.blocks, receipt.deferred) == (4, 4)
    assert found(store, TOKENS).tokens == 0
    gate.open()
    assert all(load.wait(layer) for layer in range(2)) and wrong(load, TOKENS) == []
    load.release()
    assert found(store, TOKENS).tokens == 0
    assert store.stats()["tiers"]["disk"]["blocks"] == 0


def test_a_tail_that_is_superseded_while_it_is_fetched(pair: tuple[LocalStore, GatedTier]) -> None:
    store, tier = pair
    save(store, TOKENS[:20])
    only_on_disk(store)
    gate = tier.gate("read", 2)
    load = store.load(found(store, TOKENS[:20]))
    gate.reached(2)
    save(store, TOKENS[:30])
    gate.open()
    assert load.wait(1) and wrong(load, TOKENS[:20]) == []
    load.release()
    assert load_all(store, TOKENS) == 30


def test_blocks_that_are_fetched_are_not_evicted_from_disk(tmp_path: Path) -> None:
    with gated(tmp_path / "cache", host=4 * MIB, disk=6 * MIB) as (store, tier):
        save(store, TOKENS[:16])
        only_on_disk(store)
        gate = tier.gate("read")
        load = store.load(found(store, TOKENS))
        gate.reached()
        for other in range(2, 200):
            save(store, ids(other, 64)).wait()
        assert store.stats()["counters"]["disk_evicted_blocks"] > 100
        gate.open()
        assert load.wait(1) and wrong(load, TOKENS[:16]) == [] and load.good_tokens(1) == 16
        load.release()
        store.flush()
        assert recount(store) == []


def test_a_load_that_is_dropped_while_it_is_fetched(pair: tuple[LocalStore, GatedTier]) -> None:
    store, tier = pair
    save(store, TOKENS)
    only_on_disk(store)
    gate = tier.gate("read", 4)
    store.load(found(store, TOKENS))
    gc.collect()
    gate.reached(4)
    assert store.stats()["leases"] == 4  # of the fetches
    gate.open()
    assert load_all(store, [*TOKENS, 0]) == 64


def test_closing_in_the_middle_of_a_load_loses_nothing(tmp_path: Path) -> None:
    many = ids(1, 16 * 12)
    with gated(tmp_path / "cache") as (store, tier):
        save(store, many)
        only_on_disk(store)
        gate = tier.gate("read", WORKERS)
        load = store.load(found(store, many))
        gate.reached(WORKERS)  # as many as there are workers are under way, the others wait
        waiter, closer = Task(lambda: load.wait(0)), Task(store.close)
        gate.open()
        closer.result()
        waiter.result()
        assert wrong(load, many) == []
        load.release()
    with kvstore.open(tmp_path / "cache", host="8MiB", disk="64MiB") as store:
        assert load_all(store, [*many, 0]) == len(many)


@pytest.mark.parametrize("where", ["write", "commit", "commit done"])
def test_a_block_that_is_forgotten_while_it_is_written(pair: tuple[LocalStore, GatedTier], where: str) -> None:
    store, tier = pair
    gate = tier.gate(where.split()[0], after="done" in where)
    saved = save(store, TOKENS[:16], owner="a")
    gate.reached()
    receipt = store.forget(owner="a")
    assert (receipt.blocks, receipt.deferred) == (1, 1)
    gate.open()
    assert saved.wait().tokens == 0
    store.flush()
    assert found(store, TOKENS).tokens == 0
    assert store.stats()["tiers"]["disk"]["blocks"] == 0
    assert list(store.verify()) == []


@pytest.mark.parametrize("where", ["write", "commit", "commit done"])
def test_a_block_that_is_saved_anew_while_its_forgotten_self_is_written(
    pair: tuple[LocalStore, GatedTier], where: str
) -> None:
    store, tier = pair
    gate = tier.gate(where.split()[0], after="done" in where)
    save(store, TOKENS[:16], owner="a")
    gate.reached()
    store.forget(owner="a")
    again = Task(save(store, TOKENS[:16], owner="b").wait)
    flushed = Task(store.flush)
    gate.open()
    assert again.result().tokens == 16 and flushed.result()
    only_on_disk(store)
    assert load_all(store, TOKENS) == 16


@pytest.mark.parametrize("where", ["write", "commit", "commit done"])
def test_a_tail_that_is_superseded_while_it_is_written(pair: tuple[LocalStore, GatedTier], where: str) -> None:
    store, tier = pair
    gate = tier.gate(where.split()[0], after="done" in where)
    first = save(store, TOKENS[:9])
    waiter = Task(first.wait)
    gate.reached()
    second = save(store, TOKENS[:14])
    gate.open()
    assert waiter.result().tokens in (0, 9)
    assert second.wait().tokens == 14
    only_on_disk(store)
    assert load_all(store, TOKENS) == 14
    assert store.stats()["tiers"]["disk"]["blocks"] == 1


def test_closing_while_a_write_takes_too_long_frees_those_who_wait(tmp_path: Path) -> None:
    with gated(tmp_path / "cache") as (store, tier):
        gate = tier.gate("write", WORKERS // 2)
        saved = save(store, ids(1, 16 * 9))
        waiter = Task(saved.wait)
        gate.reached(WORKERS // 2)
        closer = Task(lambda: store.close(timeout=0.01))
        while not store._residency.closed:  # it has waited long enough for the writes
            closer.join(0.001)
        with pytest.raises(StoreClosed):
            store.match(NS, SMALL, TOKENS)
        gate.open()
        closer.result()
        assert waiter.result().tokens <= 16 * (WORKERS // 2)
        assert saved.wait().tokens <= 16 * (WORKERS // 2)
    with kvstore.open(tmp_path / "cache", host="8MiB", disk="64MiB") as store:
        assert load_all(store, ids(1, 16 * 9)) == waiter.result().tokens


def test_a_save_that_comes_while_the_store_closes_is_kept_or_refused(tmp_path: Path) -> None:
    for attempt in range(8):
        kept: list[int] = []
        store = kvstore.open(tmp_path / "cache", host="4MiB", disk="32MiB")

        def saving(opened: LocalStore = store, base: int = attempt * 1000, kept: list[int] = kept) -> None:
            for number in range(base, base + 1000):
                save(opened, ids(number, 20))
                kept.append(number)

        task = Task(saving)
        while len(kept) < 5:
            pass
        store.close()
        with pytest.raises(StoreClosed):
            task.result()
        with kvstore.open(tmp_path / "cache", host="4MiB", disk="32MiB") as again:
            assert load_all(again, ids(kept[0], 20)) == 19
            assert recount(again) == []


def test_all_who_wait_for_a_block_that_fails_learn_it(pair: tuple[LocalStore, GatedTier]) -> None:
    store, tier = pair
    save(store, TOKENS)
    only_on_disk(store)
    gate = tier.gate("read", 4, error=True)
    match, late = found(store, TOKENS), found(store, TOKENS)
    first = store.load(match)
    gate.reached(4)
    second = store.load(found(store, TOKENS[:40]))
    gate.open()
    for load in (first, second):
        assert not load.wait(0) and load.good_tokens() == 0
    fetches_are_over(store)
    after = store.load(late)  # holds a lease, but the blocks are gone
    assert after.tokens == 0 and found(store, TOKENS).tokens == 0
    save(store, TOKENS)
    assert load_all(store, [*TOKENS, 0]) == 64
    for load in (first, second, after):
        load.release()
    assert store.stats()["counters"]["failed_reads"] == 4


def test_a_failed_block_in_the_middle_cuts_the_load_there(pair: tuple[LocalStore, GatedTier]) -> None:
    store, tier = pair
    save(store, TOKENS)
    only_on_disk(store)
    assert load_all(store, TOKENS[:17]) == 16  # the first is in memory
    gate = tier.gate("read", error=True)
    load = store.load(found(store, TOKENS))
    gate.reached()
    gate.open()
    assert not load.wait(0)
    assert load.good_tokens() in (16, 32, 48) and wrong(load, TOKENS) == []
    fetches_are_over(store)
    good = load.good_tokens()
    load.release()
    assert found(store, TOKENS).tokens == good


@pytest.mark.parametrize("where", ["write", "commit"])
def test_what_cannot_be_written_stays_in_memory_and_is_said_not_to_be_durable(
    pair: tuple[LocalStore, GatedTier], where: str
) -> None:
    store, tier = pair
    tier.fail(where, 4)
    durable = save(store, TOKENS).wait()
    assert durable.tokens < 64
    assert load_all(store, [*TOKENS, 0]) == 64
    assert list(store.verify()) == []


def test_room_for_drafts_comes_back_when_writes_go_on(tmp_path: Path) -> None:
    with gated(tmp_path / "cache", host=1 * MIB) as (store, tier):
        gate = tier.gate("write", WORKERS // 2)
        for number in range(40):
            save(store, ids(number, 64))
        gate.reached(WORKERS // 2)
        assert store.draft(SMALL) is None
        short = save(store, ids(99, 64))
        assert short.tokens == 0
        gate.open()
        assert store.flush()
        assert save(store, ids(99, 64)).tokens == 64
        assert load_all(store, [*ids(99, 64), 0]) == 64
        store.flush()
        assert recount(store) == []


def test_a_wait_tells_nothing_of_others_who_got_its_numbers(pair: tuple[LocalStore, GatedTier]) -> None:
    store, _ = pair
    saved = save(store, TOKENS, owner="a")
    store.forget(owner="a")
    store.flush()
    for number in range(2, 6):
        save(store, ids(number, 64))
    store.flush()
    assert saved.wait() == (type(saved.wait()))(0, 0, 0)


def test_a_draft_is_held_while_others_save(pair: tuple[LocalStore, GatedTier]) -> None:
    store, _ = pair
    made = drafts(store, NS, SMALL, TOKENS)
    for number in range(2, 300):
        save(store, ids(number, 64))
    store.save(NS, SMALL, TOKENS, made)
    assert load_all(store, [*TOKENS, 0]) == 64
