"""Pinned host memory: what can be pinned is, what cannot stays pageable and works all the same."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from blocks import SMALL, ids, load_all, save
from gates import MIB, PATIENCE, Task

from kvstore.local import LocalStore
from kvstore.policies.lru import LRU
from kvstore.tiers import host
from kvstore.tiers.device import CudaPins
from kvstore.tiers.host import HostTier


class Ledger:
    """``Pins`` that only keep the books, and fail at the calls given."""

    def __init__(self, *failing: int) -> None:
        self.failing = failing
        self.calls: list[int] = []  # sizes
        self.pinned: dict[int, int] = {}
        self.threads: set[str] = set()
        self.changed = threading.Condition()

    def pin(self, address: int, size: int) -> bool:
        with self.changed:
            self.threads.add(threading.current_thread().name)
            self.calls.append(size)
            fine = len(self.calls) not in self.failing
            if fine:
                assert mapped(address, size)
                self.pinned[address] = size
            self.changed.notify_all()
            return fine

    def unpin(self, address: int) -> None:
        with self.changed:
            self.threads.add(threading.current_thread().name)
            assert mapped(address, self.pinned.pop(address)), "the memory went first"
            self.changed.notify_all()

    def called(self, times: int) -> None:
        """Waits for so many calls of ``pin``."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.calls) >= times, PATIENCE)

    def holds(self, count: int) -> None:
        """Waits until so many runs are pinned."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.pinned) == count, PATIENCE)


def mapped(address: int, size: int) -> bool:
    """Whether all of it is this process's memory."""
    for line in sorted(Path("/proc/self/maps").read_text().splitlines(), key=lambda line: int(line.split("-")[0], 16)):
        low, high = (int(part, 16) for part in line.split()[0].split("-"))
        if low <= address < high:
            size, address = size - (high - address), high
    return size <= 0


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


def grown(tier: HostTier, slot_bytes: int, extents: int) -> list[int]:
    """Takes slots until the tier has so many extents more."""
    addresses, before = [], len(tier._slab.extents)
    while len(tier._slab.extents) < before + extents and (address := tier.reserve(slot_bytes)) is not None:
        addresses.append(address)
    return addresses


def settled(tier: HostTier, pinned: int) -> None:
    """The gauges, once the thread has done its books."""
    done = threading.Event()
    for _ in range(2000):
        if tier.gauges() == {"host_pinned_bytes": pinned, "host_pageable_bytes": tier.used - pinned}:
            return
        done.wait(0.01)
    raise AssertionError(f"{tier.gauges()} instead of {pinned} of {tier.used}")


@pytest.fixture
def tier(ledger: Ledger) -> Iterator[HostTier]:
    made = HostTier(16 * MIB, ledger)
    yield made
    made.close()
    assert ledger.pinned == {} and ledger.threads <= {"kvstore-toucher"}


def test_all_memory_is_pinned_and_unpinned_before_it_goes(tier: HostTier, ledger: Ledger) -> None:
    addresses = grown(tier, 64 << 10, 5)
    ledger.holds(len(tier._slab.extents))
    settled(tier, tier.used)
    for address in addresses:
        tier.free(address)
    grown(tier, 3 * MIB, 5)  # for which the other extents must go
    ledger.holds(len(tier._slab.extents))
    settled(tier, tier.used)


@pytest.mark.parametrize("failing", range(1, 9))
def test_a_run_that_cannot_be_pinned_stays_pageable(failing: int, caplog: pytest.LogCaptureFixture) -> None:
    ledger = Ledger(failing, failing + 3)
    tier = HostTier(8 * MIB, ledger)
    with caplog.at_level("WARNING"):
        store = LocalStore(tier, None, LRU(), LRU())
        tokens = ids(1, 16 * 600)  # 12 KiB for each 16 tokens
        save(store, tokens)
        ledger.called(len(tier._slab.extents))
        missing = sum(size for call, size in enumerate(ledger.calls, 1) if call in ledger.failing)
        settled(tier, sum(ledger.calls) - missing)
        assert store.stats()["gauges"]["host_pageable_bytes"] == tier.used - sum(ledger.calls) + missing
        assert load_all(store, tokens) == len(tokens) - 1
        store.close()
    assert len(ledger.calls) >= 7 and ledger.pinned == {}
    assert len(caplog.records) == (failing <= len(ledger.calls))


def test_it_is_pinned_in_runs_of_whole_slots(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "MAX_PIN", 100 << 10)
    tier = HostTier(16 * MIB, ledger)
    size = SMALL.full_slot_bytes
    grown(tier, size, 1)
    settled(tier, tier.used)
    assert all(run % size == 0 and run <= 100 << 10 for run in ledger.calls)
    before = tier.used
    grown(tier, 200 << 10, 1)  # no run of whole slots is short enough
    settled(tier, before)
    tier.close()


def kept_from_children(address: int) -> bool:
    """Whether a fork leaves out the memory there."""
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first and not first.endswith(":"):
            low, high = (int(part, 16) for part in first.split("-"))
            found = low <= address < high
        elif found and first == "VmFlags:":
            return "dc" in rest
    raise AssertionError("there is no memory")


@pytest.mark.parametrize("pins", [True, False], ids=["pinned", "pageable"])
def test_a_fork_does_not_move_pages_away_from_the_device(pins: bool, ledger: Ledger) -> None:
    tier = HostTier(16 * MIB, ledger if pins else None)
    (address,) = grown(tier, 64 << 10, 1)
    assert kept_from_children(tier.pointer(address)) is pins
    tier.close()


def test_what_was_never_touched_is_not_unpinned(ledger: Ledger) -> None:
    tier = HostTier(16 * MIB, ledger)
    addresses = grown(tier, 64 << 10, 3)
    tier.close()
    assert ledger.pinned == {} and addresses


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is CUDA")
def test_where_cuda_does_not_start_nothing_is_pinned() -> None:
    pins = CudaPins("cuda:0")
    assert not pins.pin(4096, 4096)
    pins.unpin(4096)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA here")
def test_cuda_pins_memory_and_a_failure_leaves_nothing_behind() -> None:
    tier = HostTier(16 * MIB, CudaPins("cuda"))
    grown(tier, 64 << 10, 3)
    settled(tier, tier.used)
    tier.close()
    assert not Task(lambda: CudaPins("cuda").pin(4096, 1 << 40)).result()  # nobody's memory
    assert int(torch.ones(8, device="cuda").sum()) == 8
