"""How quick the disk is, from transfers that overlap; and how many of them there are at once."""

from __future__ import annotations

import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
from blocks import SMALL, found, ids, save
from gates import PATIENCE, gated, only_on_disk

from kvstore.errors import TierError
from kvstore.mover import Mover, Priority
from kvstore.rates import PART_BYTES, Kind, Rates

MB = 10**6


class Disk:
    """Transfers on a clock of their own: a list of (when, what happens), played by ``play``."""

    def __init__(self) -> None:
        self.now = 0.0
        self.rates = Rates(lambda: self.now)

    def play(self, kind: Kind, size: int, begin: float, end: float, beside: Kind | None = None) -> None:
        """One transfer, alone or with one of another kind of the same length and size beside it."""
        self.now = begin
        with ExitStack() as stack:
            stack.enter_context(self.rates.moving(kind, size))
            if beside is not None:
                stack.enter_context(self.rates.moving(beside, size))
            self.now = end

    def gauge(self, name: str) -> int:
        return self.rates.gauges()[name]

    @property
    def reads(self) -> int:
        return self.gauge("disk_read_bytes_per_second")

    @property
    def writes(self) -> int:
        return self.gauge("disk_write_bytes_per_second")


def test_one_transfer_after_the_other() -> None:
    disk = Disk()
    assert disk.rates.reads is None and disk.reads == 0
    for number in range(4):
        disk.play("read", 2 * MB, number, number + 0.1)
    assert disk.reads == pytest.approx(20 * MB, rel=0.05)
    assert disk.writes == 0


@pytest.mark.parametrize("fair", [True, False])
def test_those_that_overlap_count_together(fair: bool) -> None:
    """Four at once, each at a quarter of the speed, or one after the other: the disk is as quick either way."""
    disk = Disk()
    for turn in range(4):
        begin = disk.now = 10.0 * turn
        with ExitStack() as stack:
            ends = [stack.enter_context(ExitStack()) for _ in range(4)]
            for each in ends:
                each.enter_context(disk.rates.moving("read", 5 * MB))
            for number, each in enumerate(ends, 1):
                disk.now = begin + (4.0 if fair else number)
                each.close()
    assert disk.reads == pytest.approx(5 * MB, rel=0.05)


def test_a_disk_that_is_never_idle_is_measured_on_the_way() -> None:
    disk = Disk()
    with ExitStack() as first, ExitStack() as second:
        for number in range(40):
            disk.now = 0.1 * number
            stack = (first, second)[number % 2]
            stack.close()
            stack.enter_context(disk.rates.moving("read", 2 * MB))
        assert disk.reads == pytest.approx(20 * MB, rel=0.1)  # two of 0.2 seconds at once


def test_what_is_written_beside_counts_for_the_disk() -> None:
    """A read that shares the disk with a write takes twice as long, which does not make the disk slower."""
    disk = Disk()
    for number in range(4):
        disk.play("read", 2 * MB, number, number + 0.4, beside="write")
    assert disk.reads == pytest.approx(10 * MB, rel=0.05)


def test_writes_tell_of_reads_until_there_are_some() -> None:
    disk = Disk()
    for number in range(4):
        disk.play("write", 6 * MB, number, number + 0.6)
    assert disk.rates.reads is not None and 1 / disk.rates.reads.per_byte == pytest.approx(10 * MB, rel=0.05)
    for number in range(4, 8):
        disk.play("read", 6 * MB, number, number + 0.1)
    assert 1 / disk.rates.reads.per_byte == pytest.approx(60 * MB, rel=0.05)
    assert disk.writes == pytest.approx(10 * MB, rel=0.05)


def test_what_fails_is_not_counted_and_does_not_stay() -> None:
    disk = Disk()
    for number in range(4):
        disk.now = number
        with pytest.raises(TierError), disk.rates.moving("write", 100 * MB):
            assert disk.rates.writing == 100 * MB
            disk.now += 0.5
            raise TierError("the medium is broken")
    assert disk.rates.writing == 0 and disk.writes == 0
    assert disk.rates.reads is None


def test_short_transfers_are_measured_together() -> None:
    disk = Disk()
    for number in range(3000):
        disk.play("read", 10_000, 0.01 * number, 0.01 * number + 1e-4)
    assert disk.reads == pytest.approx(100 * MB, rel=0.1)


def test_a_slow_disk_gets_less_at_once() -> None:
    disk = Disk()
    assert disk.rates.part_bytes == PART_BYTES
    assert disk.rates.reads_at_once == disk.rates.writes_at_once == sys.maxsize
    for number in range(4):
        disk.play("write", 5 * MB, 2 * number, 2 * number + 1)
    assert disk.rates.writes_at_once == 1
    assert disk.rates.part_bytes == pytest.approx(0.02 * 5 * MB, rel=0.1)  # a read of 20 ms
    assert disk.rates.reads_at_once == 2
    for number in range(10, 22):
        disk.play("write", 5 * MB, 2 * number, 2 * number + 0.01)
        disk.play("read", 5 * MB, 2 * number + 1, 2 * number + 1.01)
    assert disk.rates.part_bytes == PART_BYTES
    assert disk.rates.reads_at_once > 8 and disk.rates.writes_at_once > 8


# -- in a store -------------------------------------------------------------------------------------------------------


def test_a_store_measures_what_it_moves(tmp_path: Path) -> None:
    with gated(tmp_path / "cache") as (store, tier):
        gate = tier.gate("write", 4, after=True)
        saved = save(store, ids(1, 64))
        writing = threading.Thread(target=saved.wait)
        writing.start()
        gate.reached(4)
        assert store.stats()["gauges"]["disk_writing_bytes"] == 4 * SMALL.full_slot_bytes
        gate.open()
        writing.join(PATIENCE)
        only_on_disk(store)
        gate = tier.gate("read")
        load = store.load(found(store, ids(1, 64)))
        gate.reached()
        left = store.stats()["gauges"]["disk_queued_read_bytes"]
        assert 0 < left <= 4 * SMALL.payload_bytes(SMALL.block_tokens)
        gate.open()
        assert load.wait(len(SMALL.layers) - 1)
        assert store.stats()["gauges"]["disk_queued_read_bytes"] == 0
        load.release()


def test_what_a_load_would_take(tmp_path: Path) -> None:
    tokens = ids(1, 64)
    with gated(tmp_path / "cache") as (store, tier):
        save(store, tokens).wait()
        host = store.prospect([found(store, tokens)])
        assert [(portion.tokens, portion.tier, portion.bytes) for portion in host.rows[0]] == [(16, "host", 0)] * 4
        only_on_disk(store)
        match = found(store, tokens)
        slot = SMALL.full_slot_bytes
        disk = store.prospect([match, match])  # what two need is read once
        assert [portion.bytes for portion in disk.rows[0]] == [slot] * 4
        assert [(portion.tier, portion.bytes) for portion in disk.rows[1]] == [("disk", 0)] * 4
        assert disk.queued == 0 and disk.disk is None and disk.layers == len(SMALL.layers)
        gate = tier.gate("read", 4)
        load = store.load(match)
        gate.reached()
        mine, others = store.prospect([found(store, tokens)]), store.prospect([found(store, ids(2, 64))])
        assert all(0 < portion.bytes <= slot for portion in mine.rows[0]) and mine.queued == 0
        assert others.queued == sum(portion.bytes for portion in mine.rows[0])
        gate.open()
        assert load.wait(len(SMALL.layers) - 1)
        load.release()


def test_a_match_that_is_cut_lets_go_of_the_rest(tmp_path: Path) -> None:
    tokens = ids(1, 64)
    with gated(tmp_path / "cache") as (store, _):
        save(store, tokens).wait()
        match = found(store, tokens)
        assert store.stats()["leases"] == 4
        match.cut(40)  # whole blocks of 16
        assert (match.tokens, match.tokens_by_tier["host"], len(match.blocks)) == (32, 32, 2)
        assert store.stats()["leases"] == 2
        load = store.load(match)
        assert load.tokens == 32 and load.wait(len(SMALL.layers) - 1)
        load.release()
        assert store.stats()["leases"] == 0
        match = found(store, tokens)
        match.cut(64)
        assert match.tokens == 64
        match.release()
        match.cut(0)  # of what is released nothing is held
        assert store.stats()["leases"] == 0


# -- workers ----------------------------------------------------------------------------------------------------------


class Held:
    """Jobs that wait until they are let go."""

    def __init__(self, mover: Mover) -> None:
        self._mover = mover
        self._begun = threading.Semaphore(0)
        self._go = threading.Semaphore(0)

    def submit(self, priority: Priority, times: int) -> None:
        for number in range(times):
            assert self._mover.submit(priority, (number,), self._job)

    def _job(self) -> None:
        self._begun.release()
        assert self._go.acquire(timeout=PATIENCE)

    def begun(self, times: int) -> None:
        for _ in range(times):
            assert self._begun.acquire(timeout=PATIENCE), "a job has not begun"

    def waits(self) -> bool:
        """Whether what is next may not begin yet."""
        with self._mover._ready:
            return bool(self._mover._heap) and not self._mover._next()

    def let_go(self, times: int) -> None:
        self._go.release(times)


def test_saves_leave_workers_to_who_waits() -> None:
    mover = Mover(4)
    saves, reads = Held(mover), Held(mover)
    saves.submit(Priority.SAVE, 6)
    saves.begun(2)
    assert saves.waits()
    reads.submit(Priority.DEMAND, 2)
    reads.begun(2)  # at once, though there are saves that came before
    saves.let_go(6)
    saves.begun(4)
    reads.let_go(2)
    mover.close()


def test_on_a_slow_disk_one_write_goes_at_a_time_and_few_reads() -> None:
    mover = Mover(8)
    mover.rates.reads_at_once, mover.rates.writes_at_once = 2, 1
    saves, reads = Held(mover), Held(mover)
    saves.submit(Priority.SAVE, 3)
    saves.begun(1)
    assert saves.waits()
    reads.submit(Priority.DEMAND, 5)
    reads.begun(2)
    assert reads.waits()
    reads.let_go(1)
    reads.begun(1)
    saves.let_go(3)
    reads.let_go(4)
    reads.begun(2)
    saves.begun(2)
    mover.close()
