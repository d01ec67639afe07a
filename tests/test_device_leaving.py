"""What leaves the store leaves the device, and what is forgotten is erased there."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from blocks import WIDE, found, ids, recount, save
from devices import HERE, a_store_with_a_device, asked, bring, device, heat, recount_device, wrong_on_device
from gates import only_on_disk

import kvstore
from kvstore.hot import Hot
from kvstore.local import LocalStore
from kvstore.tensors.streams import ThreadStream
from kvstore.tiers.device import DeviceTier

TOKENS = ids(1, 3 * 32 + 7)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LocalStore]:
    yield from a_store_with_a_device(tmp_path / "cache")


def test_what_leaves_memory_and_disk_leaves_the_device(store: LocalStore) -> None:
    save(store, TOKENS, layout=WIDE)
    heat(store, TOKENS)
    only_on_disk(store)
    assert len(list(device(store))) == 4
    residency = store._residency
    with residency.lock:
        for number in list(residency.index.number.values())[::-1]:
            residency.drop_disk(number)
    assert list(device(store)) == []
    assert found(store, TOKENS, layout=WIDE).tokens == 0


def test_without_a_disk_what_leaves_memory_leaves_the_device() -> None:
    with kvstore.open(host="2MiB", device="1MiB", device_name="cpu") as store:
        for n in range(12):
            save(store, ids(n, 64), layout=WIDE)
            heat(store, ids(n, 64))
        assert store.stats()["counters"]["host_evicted_blocks"] > 4
        assert recount_device(store) == []
        assert 0 < len(list(device(store))) <= 5


def test_a_tail_that_is_superseded_leaves_the_device(store: LocalStore) -> None:
    save(store, TOKENS[:40], layout=WIDE)
    heat(store, TOKENS[:40])
    save(store, TOKENS[:50], layout=WIDE)
    assert found(store, TOKENS[:50], layout=WIDE).tokens_by_tier == {"device": 32, "host": 18, "disk": 0, "remote": 0}
    heat(store, TOKENS[:50])
    made = asked(store, TOKENS[:50])
    assert made.tokens_by_tier(50)["device"] == 50 and wrong_on_device(made, TOKENS) == []


def test_what_expires_leaves_the_device(store: LocalStore) -> None:
    save(store, TOKENS, layout=WIDE, ttl=100.0)
    heat(store, TOKENS)
    now = store._residency.wall()
    store._residency.wall = lambda: now + 101.0
    assert found(store, TOKENS, layout=WIDE).tokens == 0
    assert list(device(store)) == []


def pool(store: LocalStore) -> torch.Tensor:
    tier = device(store).tier
    assert isinstance(tier, DeviceTier) and tier._pool is not None
    return tier._pool


def test_what_is_forgotten_is_erased_on_the_device(store: LocalStore) -> None:
    other = ids(2, 32)
    pool(store).zero_()
    save(store, other, layout=WIDE, owner="other")
    heat(store, other)
    before = pool(store).clone()
    save(store, TOKENS, layout=WIDE, owner="me").wait()
    heat(store, TOKENS)
    assert not torch.equal(pool(store), before)
    receipt = store.forget(owner="me")
    assert (receipt.blocks, receipt.deferred) == (4, 0)
    assert torch.equal(pool(store), before)
    assert store.stats()["counters"]["device_erased_blocks"] == 4


def test_what_is_forgotten_while_it_is_read_is_erased_afterwards(store: LocalStore) -> None:
    pool(store).zero_()
    save(store, TOKENS, layout=WIDE, owner="me").wait()
    heat(store, TOKENS)
    reading, stream = asked(store, TOKENS), ThreadStream("kvstore-test")
    assert store.forget(owner="me").deferred == 4
    assert list(device(store)) == []
    bring(reading, stream)
    assert wrong_on_device(reading, TOKENS) == []
    reading.release()
    stream.close()
    store.stats()
    store.forget(owner="nobody")  # comes back when all that was to be erased is
    assert int(pool(store).max()) == 0
    assert store.stats()["counters"]["device_erased_blocks"] == 4


def test_what_was_being_filled_when_it_was_forgotten_is_never_found(store: LocalStore) -> None:
    pool(store).zero_()
    save(store, TOKENS, layout=WIDE, owner="me")
    filling = asked(store, TOKENS)
    store.forget(owner="me")
    save(store, TOKENS, layout=WIDE, writer=1)
    assert bring(filling, HERE)
    assert list(device(store)) == []
    filling.release()
    store.forget(owner="nobody")
    assert int(pool(store).max()) == 0


def turmoil(folder: Path, seed: int) -> list[str]:
    """What loads found wrong on the device, where memory, disk and device are all too small.

    What was forgotten is saved anew with other bytes.
    """
    draw, stream, hot = random.Random(seed), ThreadStream("kvstore-test"), 0
    chains = [ids(seed + n, draw.randint(40, 100)) for n in range(12)]
    writer, faults = [0] * len(chains), list[str]()
    with kvstore.open(folder / "cache", host="2MiB", disk="6MiB", device="1MiB", device_name="cpu") as store:
        for _ in range(400):
            number = draw.randrange(len(chains))
            tokens, what = chains[number], draw.random()
            if what < 0.35:
                part = tokens[: draw.randint(1, len(tokens))]
                save(store, part, layout=WIDE, owner=str(number), writer=writer[number])
            elif what < 0.4:
                only_on_disk(store)
            elif what < 0.5:
                store.forget(owner=str(number))
                writer[number] += 1
            else:
                made = asked(store, tokens)
                hot += made.tokens_by_tier(1000)["device"]
                if draw.random() < 0.9 and bring(made, stream):
                    stream.record().wait()
                    faults += wrong_on_device(made, tokens, writer=writer[number])
                if draw.random() < 0.5:
                    made.release()
                del made
        stream.close()
        store.flush()
        faults += recount(store) + recount_device(store)
        counters = store.stats()["counters"]
        assert min(hot // 50, counters["device_evicted_blocks"], counters["disk_evicted_blocks"]) > 20
    return faults


def test_whatever_happens_the_device_has_what_was_saved_last(tmp_path: Path, seed: int) -> None:
    assert turmoil(tmp_path, seed) == []


def test_where_blocks_stay_on_the_device_it_is_noticed(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Hot, "drop", lambda hot, number, erase: None)
    faults = turmoil(tmp_path, seed)
    assert any(fault.startswith("layer") for fault in faults), faults
