"""How loads end: under the store's lock, before their streams, with the store, beside another of the same match."""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from blocks import WIDE, found, ids, recount, save, wrong
from devices import HERE, asked, bring, device
from gates import MIB, PATIENCE, Task

import kvstore
from kvstore.hot import Hot
from kvstore.load import Load
from kvstore.local import LocalStore
from kvstore.mover import Mover, Priority
from kvstore.policies.lru import LRU
from kvstore.tensors.streams import Event, ThreadStream
from kvstore.tiers.host import HostTier
from kvstore.tiers.naive import NaiveDevice

TOKENS = ids(1, 3 * 32 + 7)


def held_up(stream: ThreadStream) -> threading.Event:
    """Nothing goes on in the stream before the event is set."""
    gate = threading.Event()

    def waits() -> None:
        gate.wait(PATIENCE)

    stream.run(waits)
    return gate


def test_a_cache_that_is_collected_under_the_stores_lock_ends_its_load() -> None:
    """The collector may end a load in the middle of any section that holds that lock, so nothing may take it."""
    with kvstore.open(host="8MiB", device="1MiB", device_name="cpu") as store:
        save(store, TOKENS, layout=WIDE)
        made = asked(store, TOKENS)
        assert all(place.slot is not None and not place.hot for place in made.places(0))

        def ends() -> None:
            made.used(HERE.record())
            made.filled()
            made.release()

        with store._residency.lock:
            Task(ends).result()
        assert len(list(device(store))) == 4  # from the store's next call on
        assert recount(store) == []


def read_by(stream: ThreadStream, load: Load) -> list[torch.Tensor]:
    """The first layer's keys, copied from raw addresses in the stream, as kernels do; the load notes it."""
    copies = []
    for place in load.places(0):
        size = WIDE.key_bytes(0, place.stride)
        target = torch.zeros(size, dtype=torch.uint8)
        stream.run(partial(_copy, target, place.keys, size))
        copies.append(target)
    load.used(stream.record())
    return copies


def _copy(target: torch.Tensor, address: int, size: int) -> None:
    ctypes.memmove(target.data_ptr(), address, size)


@pytest.mark.parametrize("ended", [True, False], ids=["ended", "not ended"])
def test_the_store_closes_behind_streams_that_still_read_its_memory(ended: bool) -> None:
    store = kvstore.open(host="8MiB", device=0, device_name="cpu")  # no slots, whose events the tier waits for
    save(store, TOKENS, layout=WIDE)
    made, stream = asked(store, TOKENS), ThreadStream("kvstore-test")
    expected = [bytes(piece.keys) for piece in made.pieces(0)]
    views = [source.view for source in made._sources]  # so that a fault is no crash
    gate = held_up(stream)
    copies = read_by(stream, made)
    if ended:
        made.release()
    closing = Task(store.close)
    closing.join(0.1)
    assert closing.is_alive() and store._residency.host._memory
    gate.set()
    closing.result()
    assert [bytes(copy.numpy()) for copy in copies] == expected and len(views) == 4
    stream.close()


def test_what_a_load_keeps_goes_when_its_streams_are_done_with_it() -> None:
    with kvstore.open(host="8MiB", device=0, device_name="cpu") as store:
        save(store, TOKENS, layout=WIDE)
        made, stream = asked(store, TOKENS), ThreadStream("kvstore-test")
        memory = torch.zeros(8)
        there = weakref.ref(memory)
        made.keep(memory)
        del memory
        gate = held_up(stream)
        made.used(stream.record())
        made.release()
        del made
        store.stats()
        assert there() is not None
        gate.set()
        stream.close()
        store.stats()
        assert there() is None


def test_two_loads_of_a_match_end_apart() -> None:
    with kvstore.open(host="8MiB") as store:
        save(store, TOKENS, layout=WIDE)
        match = found(store, TOKENS, layout=WIDE)
        first, second = store.load(match), store.load(match)
        first.release()
        assert store.stats()["leases"] == 4
        assert second.wait(0) and wrong(second, TOKENS) == []
        second.release()
        assert store.stats()["leases"] == 0
        assert store.load(match).tokens == 0  # its lease is over
        assert recount(store) == []


def test_a_store_closes_well_whatever_its_worker_was_given(tmp_path: Path) -> None:
    def broken() -> None:
        raise ValueError("broken work")

    store = kvstore.open(tmp_path / "cache", host="8MiB", disk="64MiB")
    save(store, TOKENS, layout=WIDE)
    store.worker().run(broken)
    store.worker().record().wait()
    store.worker().run(lambda: None)
    store.close()
    with kvstore.open(tmp_path / "cache", host="8MiB", disk="64MiB") as again:
        assert found(again, TOKENS, layout=WIDE).tokens == len(TOKENS)


class Broken(NaiveDevice):
    """A device that fails while it erases, as CUDA does: by what waits for it."""

    fails = True

    def erase(self, addresses: Sequence[int]) -> Event:
        if self.fails:
            return Failed()
        return super().erase(addresses)


class Failed:
    """Its event."""

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")


def test_a_device_that_fails_while_it_erases_is_asked_again() -> None:
    tier = Broken(2 * MIB)
    with LocalStore(HostTier(8 * MIB), None, LRU(), LRU(), hot=Hot(tier, LRU())) as store:
        save(store, TOKENS, layout=WIDE, owner="me")
        made = asked(store, TOKENS)
        assert bring(made, HERE)
        made.release()
        assert len(list(device(store))) == 4
        assert store.forget(owner="me").deferred == 4
        assert store.stats()["counters"]["failed_erases"] == 1 and tier.used
        tier.fails = False
        assert store.forget(owner="me").deferred == 0
        assert store.stats()["counters"]["device_erased_blocks"] == 4 and not tier.used


def test_where_the_system_gives_no_threads_loads_come_late_and_nothing_raises(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start = threading.Thread.start

    def refused(thread: threading.Thread) -> None:
        if thread.name.startswith("kvstore"):
            raise RuntimeError("can't start new thread")
        start(thread)

    done = threading.Event()
    mover = Mover(1)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refused)
        store = kvstore.open(host="8MiB")
        save(store, TOKENS, layout=WIDE)
        made = store.load(found(store, TOKENS, layout=WIDE))
        assert made.wait(0) and wrong(made, TOKENS) == []
        made.release()
        assert mover.submit(Priority.SAVE, (0,), done.set)
        store.close()
    assert mover.submit(Priority.SAVE, (1,), lambda: None)
    assert done.wait(PATIENCE)
    mover.close()
    assert {record.message.partition(":")[0] for record in caplog.records} == {
        "no thread touches memory ahead of its use",
        "the system gives no more threads",
    }
