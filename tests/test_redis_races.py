"""Many at once, and at bad moments: one lookup and one read of what many want, forgetting beside writes and reads."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest
from blocks import NS, SMALL, WIDE, found, ids, load_all, marks, namespace, save, wrong
from devices import HERE, asked, bring, wrong_on_device
from gates import PATIENCE, Task
from queues import nobody_waits
from remotes import MIB, TOKENS, GatedRemote, counters, options, settled, sharing, tiers

from kvstore.bench.remote.server import wait_until
from kvstore.errors import TierError
from kvstore.hot import Hot
from kvstore.job import Job
from kvstore.local import LocalStore
from kvstore.mover import Priority
from kvstore.policies.lru import LRU
from kvstore.remote import seeker
from kvstore.remote.sender import SHARE
from kvstore.tiers.base import Wanted
from kvstore.tiers.naive import NaiveDevice
from kvstore.tiers.naive_remote import NaiveRemote, Shelf

Pair = tuple[LocalStore, LocalStore, GatedRemote]


class CountingRemote(GatedRemote):
    """One that knows how often each part was read."""

    def __init__(self, tier: NaiveRemote) -> None:
        super().__init__(tier)
        self.parts: Counter[tuple[bytes, int]] = Counter()

    def read(self, wanted: Sequence[Wanted], seconds: float) -> list[TierError | None]:
        self.parts.update((each.key, each.part) for each in wanted)
        return self.tier.read(wanted, seconds)


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


@pytest.fixture
def pair(shelf: Shelf) -> Iterator[Pair]:
    """A store that has shared a conversation, one that has not, and the gates before what both share."""
    how, gates = options(), GatedRemote(NaiveRemote(shelf))
    with sharing(NaiveRemote(shelf), how) as one, sharing(gates, how) as other:
        save(one, TOKENS)
        assert one.flush(PATIENCE)
        wait_until(lambda: gates.calls["find"] == 2)  # it has said hello
        yield one, other, gates


def test_one_lookup_and_one_read_of_what_64_want(shelf: Shelf) -> None:
    how, counting = options(), CountingRemote(NaiveRemote(shelf))
    with sharing(NaiveRemote(shelf), how) as one, sharing(counting, how) as other:
        save(one, TOKENS)
        assert one.flush(PATIENCE)
        barrier, good = threading.Barrier(64), list[int]()

        def ask() -> None:
            barrier.wait(PATIENCE)
            good.append(load_all(other, [*TOKENS, 0]))

        threads = [threading.Thread(target=ask) for _ in range(64)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert good == [64] * 64
        assert len(counting.parts) == 4 and set(counting.parts.values()) == {1}
        assert counters(other)["remote_lookups"] == 1


def test_who_asks_while_another_asks_gets_the_same_answer(pair: Pair) -> None:
    _, other, gates = pair
    gate = gates.gate("find")
    tasks = [Task(lambda: tiers(other, TOKENS)) for _ in range(5)]
    gate.reached()
    gate.open()
    assert [task.result() for task in tasks] == [{"remote": 64}] * 5
    assert gates.calls["find"] == 3 and counters(other)["remote_lookups"] == 1


def test_small_parts_of_many_blocks_come_in_one_exchange(pair: Pair) -> None:
    _, other, gates = pair
    load = other.load(found(other, TOKENS))
    assert load.wait(1) and wrong(load, TOKENS) == []
    assert gates.calls["read"] <= 4
    load.release()


def test_what_was_missed_just_now_is_not_asked_for_again(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other, _ = pair
    for _ in range(5):
        assert tiers(other, ids(7, 64)) == {}
    assert counters(other)["remote_lookups"] == 1
    save(one, ids(7, 64))
    assert one.flush(PATIENCE) and tiers(other, ids(7, 64)) == {}
    monkeypatch.setattr(seeker, "MISSING_SECONDS", 0.0)
    assert tiers(other, ids(8, 64)) == {} and tiers(other, ids(8, 64)) == {}
    assert counters(other)["remote_lookups"] == 3


def test_what_is_all_here_is_not_asked_for(pair: Pair) -> None:
    one, _, _ = pair
    before = counters(one)["remote_lookups"]
    assert tiers(one, TOKENS) == {"host": 64} and tiers(one, TOKENS[:33]) == {"host": 33}
    assert counters(one)["remote_lookups"] == before
    assert tiers(one, [*TOKENS, *ids(2, 16)]) == {"host": 64} and counters(one)["remote_lookups"] == before + 1


def test_forgetting_while_it_is_written_leaves_nothing_there(shelf: Shelf) -> None:
    gates = GatedRemote(NaiveRemote(shelf))
    with sharing(gates, options()) as store:
        gate = gates.gate("put")
        save(store, TOKENS, owner="me")
        gate.reached()
        receipt = store.forget(owner="me")
        assert receipt.deferred >= 1  # its bytes are read still
        gate.open()
        assert store.flush(PATIENCE)
        assert not shelf.parts and tiers(store, TOKENS) == {}


def test_forgetting_while_it_is_read_gives_nothing_afterwards(pair: Pair, shelf: Shelf) -> None:
    _, other, gates = pair
    gate = gates.gate("read", after=True)
    load = other.load(found(other, TOKENS))
    gate.reached()
    other.forget(tenant="")
    gate.open()
    assert wrong(load, TOKENS) == []
    load.release()
    settled(other)
    assert tiers(other, TOKENS) == {} and not shelf.parts


def test_a_failing_erasure_is_said_and_tried_again(pair: Pair, shelf: Shelf) -> None:
    one, other, gates = pair
    gates.fails = True
    receipt = other.forget(owner="")
    assert (receipt.deferred, receipt.remote_blocks) == (1, 0) and shelf.parts
    gates.fails = False
    save(one, ids(9, 16))
    assert one.flush(PATIENCE)
    receipt = other.forget(owner="nobody")
    assert (receipt.deferred, receipt.remote_blocks) == (0, 4)
    assert len(shelf.copies) == 1  # what was made after the first call stays
    assert other.stats()["gauges"]["remote_pending_erases"] == 0


def test_the_queue_is_bounded_and_drops_are_counted(shelf: Shelf) -> None:
    gates = GatedRemote(NaiveRemote(shelf))
    with sharing(gates, options(), host=2 * MIB) as store:
        gate = gates.gate("refresh", 1000)
        save(store, ids(0, 16))
        gate.reached()
        for seed in range(1, 500):
            save(store, ids(seed, 16))
        assert store.stats()["gauges"]["remote_queued_write_bytes"] <= 2 * MIB * SHARE
        assert not store.flush(0.01)
        gate.open()
        assert store.flush(PATIENCE)
        said = counters(store)
        assert said["remote_written_blocks"] + said["remote_dropped_writes"] == 500


def test_waiting_jobs_have_it_brought(pair: Pair) -> None:
    _, other, gates = pair
    match = found(other, TOKENS)
    answers = other.schedule([Job("a", match)])
    assert answers[0].state == "prefetching" and answers[0].tokens_by_tier["remote"] == 64
    settled(other)
    assert other.schedule([Job("a", match)])[0].state == "resident"
    assert other.stats()["counters"]["prefetched_blocks"] == 4
    match.release()
    nobody_waits(other)
    gates.fails = True
    assert load_all(other, [*TOKENS, 0]) == 64


def test_a_prefetch_that_nobody_wants_any_more_is_taken_back(pair: Pair) -> None:
    _, other, gates = pair
    gate = gates.gate("read")
    blocked = other.load(found(other, TOKENS[:16]))
    gate.reached()
    others = [gates.gate("read") for _ in range(1)]
    match = found(other, TOKENS)
    intake = other._loader._intake
    with other._residency.lock:
        fetch = other._loader.start(match.blocks[3][0], Priority.PREFETCH, (0, 0))
        assert fetch is not None and other._loader.take_back(fetch)
        assert fetch.number not in intake.fetches
    for each in (gate, *others):
        each.open()
    assert wrong(blocked, TOKENS) == []
    blocked.release()
    match.release()
    assert load_all(other, [*TOKENS, 0]) == 64


def test_pins_bring_it_and_say_what_they_cannot(pair: Pair) -> None:
    _, other, _ = pair
    match = found(other, TOKENS)
    assert "other hosts" in other.retain(match, 60.0).why
    pinned = other.pin(match, "host", seconds=60.0)
    assert pinned.tokens == 64
    settled(other)
    match.release()
    assert tiers(other, TOKENS) == {"host": 64}
    pinned.release()


def test_what_loading_it_would_take_is_known_once_it_was_measured(pair: Pair) -> None:
    _, other, _ = pair
    match = found(other, TOKENS)
    prospect = other.prospect([match])
    assert {portion.tier for portion in prospect.rows[0]} == {"remote"}
    assert prospect.remote is None and prospect.unmeasured() == "the remote tier"
    assert sum(portion.bytes for portion in prospect.rows[0]) == 4 * SMALL.full_slot_bytes
    match.release()


def test_it_goes_to_the_device_by_way_of_memory(shelf: Shelf) -> None:
    how, hot, tokens = options(), Hot(NaiveDevice(4 * MIB), LRU()), ids(1, 64)
    with sharing(NaiveRemote(shelf), how) as one, sharing(NaiveRemote(shelf), how, hot=hot) as other:
        save(one, tokens, layout=WIDE)
        assert one.flush(PATIENCE)
        load = asked(other, tokens)
        assert load.tokens_by_tier(64) == {"device": 0, "host": 0, "disk": 0, "remote": 64}
        assert bring(load, HERE) and wrong_on_device(load, tokens) == []
        load.release()
        settled(other)
        assert tiers(other, tokens, layout=WIDE) == {"device": 64}


def test_a_secret_tenant_learns_nothing_from_the_keys(pair: Pair, shelf: Shelf) -> None:
    """Keys in the remote tier are keyed by the namespace: another tenant's of the same tokens differ all."""
    one, _, _ = pair
    before = {key for key, _ in shelf.parts}
    save(one, TOKENS, namespace("them"))
    assert one.flush(PATIENCE)
    assert len({key for key, _ in shelf.parts}) == 8 and len(before) == 4
    assert not set(marks(NS, TOKENS)) & before
