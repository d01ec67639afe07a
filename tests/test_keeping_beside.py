"""Pins on the device, and all verbs among loads and saves of many threads."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from blocks import SMALL, WIDE, found, ids, save
from devices import a_store_with_a_device, device, heat, recount_device
from gates import MIB, PATIENCE, only_on_disk
from kept import check, kept
from queues import counter
from test_schedule_device import uploaded
from test_stress import SPACES, Crowd

import kvstore
from kvstore.local import LocalStore


@pytest.fixture
def hot(quick: Path) -> Iterator[LocalStore]:
    """One with a device of five blocks."""
    yield from a_store_with_a_device(quick / "cache")


def test_what_is_pinned_on_the_device_stays_there(hot: LocalStore) -> None:
    chains = [ids(seed, 32) for seed in range(1, 9)]
    for tokens in chains:
        save(hot, tokens, layout=WIDE)
    heat(hot, chains[0])
    assert hot.pin(found(hot, chains[0], layout=WIDE), "device", seconds=60).tokens == 32
    assert hot.pin(found(hot, chains[1], layout=WIDE), "device", seconds=60).tokens == 32  # it is copied
    uploaded(hot, 1)
    full = hot.pin(found(hot, chains[2], layout=WIDE), "device", seconds=60)
    assert (full.tokens, full.why) == (0, "pins may take 524288 bytes of device memory")
    for tokens in chains[2:]:
        heat(hot, tokens)
    there = [found(hot, tokens, layout=WIDE).tokens_by_tier["device"] for tokens in chains]
    assert there[:2] == [32, 32] and there[2:].count(32) == 3
    for tokens in chains[2:4]:
        only_on_disk(hot)
        pinned = hot.pin(found(hot, tokens, layout=WIDE), "device", seconds=60)
        assert pinned.tokens == 0
    hot.flush()
    assert recount_device(hot) == []


def test_what_is_pinned_on_the_device_stays_in_the_last_tier_too(quick: Path) -> None:
    with kvstore.open(quick / "cache", host="2MiB", disk="8MiB", device="1MiB", device_name="cpu") as hot:
        save(hot, ids(1, 32), layout=WIDE)
        hot.pin(found(hot, ids(1, 32), layout=WIDE), "device", seconds=60)
        uploaded(hot, 1)
        for seed in range(100, 150):
            save(hot, ids(seed, 32), layout=WIDE).wait(PATIENCE)
        assert counter(hot, "disk_evicted_blocks") > 0
        assert found(hot, ids(1, 32), layout=WIDE).tokens_by_tier["device"] == 32


def test_demoted_blocks_leave_the_device(hot: LocalStore) -> None:
    tokens = ids(1, 64)
    save(hot, tokens, layout=WIDE).wait()
    heat(hot, tokens)
    hot.pin(found(hot, tokens, layout=WIDE), "device", seconds=60)
    slot = WIDE.full_slot_bytes
    assert hot.demote(found(hot, tokens, layout=WIDE)).bytes == 2 * slot + 2 * (slot - WIDE.header_bytes)
    assert list(device(hot)) == [] and kept(hot)["device"] == 0
    assert found(hot, tokens, layout=WIDE).tokens_by_tier == {"device": 0, "host": 0, "disk": 64, "remote": 0}


class Keepers(Crowd):
    """Writers that also pin, retain, demote and forget what they find."""

    def write(self, draw: random.Random) -> None:
        store, tokens, what = self.store, draw.choice(self.chains), draw.random()
        if what < 0.4:
            super().write(draw)
            return
        match = store.match(draw.choice(SPACES), self.layout, tokens)
        if what < 0.6:
            pinned = store.pin(match, draw.choice(["host", "disk"]), seconds=draw.choice([0.001, 0.1, 100.0]))
            if draw.random() < 0.7:
                pinned.release()
        elif what < 0.7:
            store.retain(match, draw.choice([0.001, 0.1]))
        elif what < 0.95:
            store.demote(match)
        else:
            store.forget(match=match)


@pytest.mark.parametrize("disk", [True, False], ids=["disk", "memory"])
def test_the_verbs_among_loads_and_saves(quick: Path, disk: bool, seed: int) -> None:
    with kvstore.open(quick / "cache" if disk else None, host=MIB, disk="6MiB") as store:
        crowd = Keepers(store, SMALL, seed, chains=60, blocks=6)
        crowd.run(1.0, readers=3, writers=5)
        assert crowd.faults == [] and crowd.checked > 0
        check(store)
        assert list(store.verify()) == []
        counters = store.stats()["counters"]
        assert "failed_jobs" not in counters and counters["expired_pins"] > 0
        now = store._residency.wall()
        store._residency.wall = lambda: now + 10_000
        assert set(kept(store).values()) == {0}
