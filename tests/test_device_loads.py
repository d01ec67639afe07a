"""Loads for a device: what is there is not brought again, and what holds it in place."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from blocks import SMALL, WIDE, found, ids, save, wrong
from devices import (
    HERE,
    MIB,
    a_store_with_a_device,
    asked,
    bring,
    device,
    heat,
    tensor,
    wrong_on_device,
)
from gates import PATIENCE, fetches_are_over, gated, only_on_disk

import kvstore
from kvstore import BadInput, Layout
from kvstore.hot import Hot
from kvstore.local import LocalStore
from kvstore.policies.lru import LRU
from kvstore.tensors.streams import ThreadStream
from kvstore.tiers.device import DeviceTier

TOKENS = ids(1, 3 * 32 + 7)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LocalStore]:
    yield from a_store_with_a_device(tmp_path / "cache")


@pytest.mark.parametrize("layout", [WIDE, SMALL], ids=["wide", "small"])
def test_what_a_load_filled_the_next_finds(store: LocalStore, layout: Layout) -> None:
    tokens = ids(2, 3 * layout.block_tokens + 5)
    save(store, tokens, layout=layout)
    first = asked(store, tokens, layout)
    assert first.tokens_by_tier(1000) == {"device": 0, "host": len(tokens), "disk": 0, "remote": 0}
    assert [(place.hot, place.slot is not None) for place in first.places(0)] == [(False, True)] * 4
    assert found(store, tokens, layout=layout).tokens_by_tier["device"] == 0
    assert bring(first, HERE)
    assert wrong(first, tokens) == wrong_on_device(first, tokens) == []
    first.release()
    match = found(store, tokens, layout=layout)
    assert match.tokens_by_tier == {"device": len(tokens), "host": 0, "disk": 0, "remote": 0}
    second = store.load(match, device=True)
    assert second.tokens_by_tier(1000) == {"device": len(tokens), "host": 0, "disk": 0, "remote": 0}
    assert all(place.hot and place.slot is not None for place in second.places(1))
    assert [place.keys for place in second.places(1)] == [p.slot.keys(1) for p in second.places(1) if p.slot]
    assert wrong_on_device(second, tokens) == []
    said = store.stats()["tiers"]["device"]
    assert (said["blocks"], said["bytes"], said["capacity"]) == (4, layout.token_payload * len(tokens), MIB)
    second.release()


def test_what_is_on_the_device_is_not_read_from_disk(store: LocalStore) -> None:
    save(store, TOKENS, layout=WIDE)
    heat(store, TOKENS[:64])
    only_on_disk(store)
    made = asked(store, TOKENS)
    assert made.tokens_by_tier(1000) == {"device": 64, "host": 0, "disk": len(TOKENS) - 64, "remote": 0}
    assert bring(made, HERE) and wrong_on_device(made, TOKENS) == []
    assert store.stats()["tiers"]["host"]["blocks"] == 2
    assert made.read_into(memoryview(bytearray(MIB))) == 0
    with pytest.raises(BadInput, match="places"):
        made.pieces(0)
    made.release()
    plain = store.load(found(store, TOKENS, layout=WIDE))  # a load for the host sees nothing of the device
    assert wrong(plain, TOKENS) == []
    assert plain.tokens_by_tier(1000)["device"] == 0
    plain.release()


def test_slots_that_nobody_filled_go_back(store: LocalStore) -> None:
    save(store, TOKENS, layout=WIDE)
    made = asked(store, TOKENS)
    beside = asked(store, TOKENS)
    assert [place.slot for place in beside.places(0)] == [None] * 4  # another is filling them
    made.release()
    del beside
    gc.collect()
    assert len(device(store)._slots) == 0
    made = asked(store, TOKENS)
    made.used(HERE.record())
    made.filled(tokens=40)  # as if the rest had been cut off
    del made
    gc.collect()
    assert found(store, TOKENS, layout=WIDE).tokens_by_tier["device"] == 64


def test_a_block_that_did_not_come_is_not_on_the_device(tmp_path: Path) -> None:
    hot = Hot(DeviceTier(4 * MIB, "cpu"), LRU())
    with gated(tmp_path / "cache", hot=hot) as (store, tier):
        save(store, TOKENS, layout=WIDE)
        only_on_disk(store)
        tier.fail("read", 1)
        made = asked(store, TOKENS)
        bring(made, HERE)
        fetches_are_over(store)
        made.filled()
        bad = {source.number for source in made._sources if not getattr(source.held, "complete", True)}
        assert len(bad) == 1 and not bad & set(hot)
        made.release()


def test_there_is_room_for_whom_is_used(store: LocalStore) -> None:
    chains = [ids(n, 64) for n in range(5)]
    for tokens in chains:
        save(store, tokens, layout=WIDE)
        heat(store, tokens)
    assert store.stats()["counters"]["device_evicted_blocks"] >= 5
    assert found(store, chains[4], layout=WIDE).tokens_by_tier["device"] == 64
    assert found(store, chains[0], layout=WIDE).tokens_by_tier["device"] == 0
    longer = ids(9, 32 * 8)
    save(store, longer, layout=WIDE)
    heat(store, longer)  # it does not fit: its beginning stays, and nothing of it makes room for the rest
    assert found(store, longer, layout=WIDE).tokens_by_tier["device"] == 32 * 5
    heat(store, longer)
    assert found(store, longer, layout=WIDE).tokens_by_tier["device"] == 32 * 5


def test_blocks_stay_in_memory_until_streams_have_read_them(store: LocalStore) -> None:
    save(store, TOKENS, layout=WIDE).wait()
    stream, made = ThreadStream("kvstore-test"), asked(store, TOKENS)
    gate = threading.Event()

    def held_up() -> None:
        gate.wait(PATIENCE)

    stream.run(held_up)
    bring(made, stream)
    made.release()
    assert not made.wait(0)  # it is over for its holder
    assert store.stats()["leases"] == 4
    gate.set()
    stream.close()
    assert store.stats()["leases"] == 0


def test_a_load_in_flight_outlives_the_store(tmp_path: Path) -> None:
    store = kvstore.open(tmp_path / "cache", host="8MiB", disk="64MiB", device="1MiB", device_name="cpu")
    save(store, TOKENS, layout=WIDE)
    heat(store, TOKENS)
    made = asked(store, TOKENS)
    slots = [place.slot for place in made.places(0) if place.slot is not None]
    before = [tensor(slot.memory).clone() for slot in slots]
    store.close()
    assert wrong_on_device(made, TOKENS) == []
    assert all(torch.equal(tensor(slot.memory), held) for slot, held in zip(slots, before, strict=True))
    made.filled()
    made.release()


def test_who_finds_a_slot_waits_until_it_is_full(store: LocalStore) -> None:
    save(store, TOKENS, layout=WIDE).wait()
    copies, reads, gate = ThreadStream("kvstore-test"), ThreadStream("kvstore-test"), threading.Event()

    def held_up() -> None:
        gate.wait(PATIENCE)

    copies.run(held_up)
    filling = asked(store, TOKENS)
    bring(filling, copies)
    finding = asked(store, TOKENS)
    assert finding.tokens_by_tier(1000)["device"] == len(TOKENS)
    finding.ready(reads)
    faults: list[str] = []
    reads.run(lambda: faults.extend(wrong_on_device(finding, TOKENS)))
    event = reads.record()
    assert not event.done()
    gate.set()
    event.wait()
    assert faults == []
    for each in (copies, reads):
        each.close()
    filling.release()
    finding.release()
