"""Many threads at once, at a twentieth of the room that they would need; every byte that comes back is checked."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest
from blocks import NS, SMALL, WIDE, found, ids, load_all, namespace, recount, save, wrong
from gates import gated, only_on_disk

import kvstore
from kvstore import Layout
from kvstore.files import OsFiles
from kvstore.local import LocalStore
from kvstore.residency import Residency

SPACES = [NS, namespace("a")]


class Crowd:
    """Readers and writers over shared chains; ``faults`` is what they saw that must not be."""

    def __init__(self, store: LocalStore, layout: Layout, seed: int, chains: int, blocks: int) -> None:
        self.store, self.layout, self.seed = store, layout, seed
        draw = random.Random(seed)
        size = layout.block_tokens
        stems = [ids(draw.randrange(2**30), 2 * size) for _ in range(chains // 4)]
        self.chains = [
            [*draw.choice(stems)[: draw.randrange(2 * size)], *ids(draw.randrange(2**30), blocks * size)]
            for _ in range(chains)
        ]
        self.faults: list[str] = []
        self.checked = 0
        self._stop = threading.Event()

    def read(self, draw: random.Random) -> None:
        space, tokens = draw.choice(SPACES), draw.choice(self.chains)
        match = self.store.match(space, self.layout, tokens[: draw.randrange(len(tokens))])
        if draw.random() < 0.1:
            return  # abandons it
        load = self.store.load(match)
        self.faults += wrong(load, tokens, space)
        self.checked += load.good_tokens()
        if draw.random() < 0.8:
            load.release()

    def write(self, draw: random.Random) -> None:
        space, tokens = draw.choice(SPACES), draw.choice(self.chains)
        what = draw.random()
        if what < 0.02:
            self.store.forget(owner=draw.choice("xyz"))
        else:
            saved = save(
                self.store, tokens[: draw.randrange(len(tokens))], space, self.layout, owner=draw.choice("xyz")
            )
            if what < 0.2:
                saved.wait(1.0)

    def run(self, seconds: float, readers: int = 8, writers: int = 4) -> None:
        def work(step: Callable[[random.Random], None], number: int) -> None:
            draw = random.Random(self.seed * 1000 + number)
            try:
                while not self._stop.is_set():
                    step(draw)
            except Exception as error:
                self.faults.append(repr(error))
                raise

        steps = [self.read] * readers + [self.write] * writers
        threads = [threading.Thread(target=work, args=(step, n)) for n, step in enumerate(steps)]
        for thread in threads:
            thread.start()
        self._stop.wait(seconds)
        self._stop.set()
        for thread in threads:
            thread.join()


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads take turns a thousand times more often than usual."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def stress(path: Path | None, layout: Layout, seed: int, seconds: float, portable: bool = False) -> Crowd:
    """A crowd on a store whose memory and disk together hold a twentieth of what the crowd saves."""
    with kvstore.open(path, host="1MiB", disk="6MiB", files=OsFiles(portable)) as store:
        crowd = Crowd(store, layout, seed, chains=400, blocks=6)
        crowd.run(seconds)
        store.flush()
        crowd.faults += recount(store) + [problem.what for problem in store.verify()]
        assert "failed_jobs" not in store.stats()["counters"]
        return crowd


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(("layout", "portable"), [(SMALL, False), (WIDE, True)], ids=["small", "wide-portable"])
def test_every_byte_under_a_crowd(tmp_path: Path, layout: Layout, portable: bool, seed: int) -> None:
    crowd = stress(tmp_path / "cache", layout, seed, 3.0, portable)
    assert crowd.faults == []
    assert crowd.checked > 0


@pytest.mark.usefixtures("hasty")
def test_every_byte_under_a_crowd_in_memory(seed: int) -> None:
    crowd = stress(None, SMALL, seed, 1.0)
    assert crowd.faults == [] and crowd.checked > 0


@pytest.mark.soak
@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("layout", [SMALL, WIDE], ids=["small", "wide"])
def test_every_byte_under_a_crowd_for_long(tmp_path: Path, layout: Layout, seed: int) -> None:
    for number in range(20):
        crowd = stress(tmp_path / "cache", layout, seed + number, 15.0)
        assert crowd.faults == []


def test_many_threads_on_one_cold_block_fetch_it_once(tmp_path: Path) -> None:
    tokens = ids(1, 16)
    with gated(tmp_path / "cache") as (store, tier):
        save(store, tokens)
        only_on_disk(store)
        start = threading.Barrier(64)
        well: list[bool] = []

        def work() -> None:
            start.wait()
            load = store.load(found(store, tokens))
            well.append(load.wait(1) and wrong(load, tokens) == [] and load.tokens == 16)
            load.release()

        threads = [threading.Thread(target=work) for _ in range(64)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert well == [True] * 64
        assert tier.calls["read"] == 1
        assert recount(store) == []


def weak_block_key(space: kvstore.Namespace, parent: bytes, tokens: bytes, extras: Any = ()) -> bytes:
    """A broken hash: 256 keys in all."""
    return blake2b(parent + tokens, digest_size=1, key=space.digest).digest() * 32


@pytest.fixture
def weak(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("keys", "index"):
        monkeypatch.setattr(f"kvstore.{module}.block_key", weak_block_key)


@pytest.mark.usefixtures("weak")
@pytest.mark.parametrize("disk", [False, True])
def test_a_broken_hash_costs_hits_and_gives_no_wrong_bytes(tmp_path: Path, disk: bool, seed: int) -> None:
    draw = random.Random(seed)
    stems = [ids(n, 32) for n in range(10)]
    with kvstore.open(tmp_path / "cache" if disk else None, host="2MiB", disk="16MiB") as store:
        for number in range(600):
            tokens = draw.choice(stems)[: draw.randrange(33)] + ids(draw.randrange(200), 64)
            if draw.random() < 0.6:
                save(store, tokens[: draw.randrange(97)], owner=draw.choice("ab"))
            else:
                load_all(store, tokens)
            if number % 50 == 0:
                store.forget(owner=draw.choice("ab"))
                only_on_disk(store)
        assert store.stats()["counters"]["matched_tokens"] > 0


def negative(monkeypatch: pytest.MonkeyPatch, planted: str) -> None:
    """Plants a fault that the crowd must notice."""
    if planted == "leases are not taken":
        monkeypatch.setattr(Residency, "hold", lambda self, numbers: None)
        monkeypatch.setattr(Residency, "unhold", lambda self, numbers: None)
    elif planted == "leases are not asked before eviction":
        monkeypatch.setattr("kvstore.room._host_address", _any_address)
    elif planted == "a lease is never given back":
        monkeypatch.setattr(Residency, "lease_ended", lambda self, numbers: None)
    elif planted == "checksums are not compared":
        monkeypatch.setattr("kvstore.intake.bad_pieces", lambda *arguments: iter(()))


def _any_address(residency: Residency, number: int) -> int:
    resident = residency.residents.get(number)
    return -1 if resident is None else resident.address


@pytest.mark.parametrize("planted", [None, "leases are not taken", "leases are not asked before eviction"])
def test_what_is_read_under_a_lease_stays(planted: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The crowd's check in slow motion, so that the fault shows for certain."""
    negative(monkeypatch, planted or "nothing")
    tokens = ids(1, 64)
    with kvstore.open(host="1MiB") as store:
        save(store, tokens)
        load = store.load(found(store, [*tokens, 0]))
        for number in range(2, 100):  # several times what there is room for
            save(store, ids(number, 256))
        assert load.wait(1) and bool(wrong(load, tokens)) == (planted is not None)
        load.release()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.usefixtures("hasty")
def test_a_lease_that_is_never_given_back_is_noticed(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    negative(monkeypatch, "a lease is never given back")
    with kvstore.open(host="1MiB") as store:
        crowd = Crowd(store, SMALL, seed, chains=200, blocks=6)
        crowd.run(0.5)
        assert crowd.faults or recount(store)


@pytest.mark.parametrize("checked", [True, False])
def test_flipped_bytes_are_noticed_by_the_store_or_by_the_test(
    tmp_path: Path, checked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not checked:
        negative(monkeypatch, "checksums are not compared")
    with gated(tmp_path / "cache") as (store, tier):
        tokens = ids(1, 16)
        save(store, tokens)
        only_on_disk(store)

        read = tier.tier.read

        def flip(address: int, offset: int, buffer: memoryview) -> None:
            read(address, offset, buffer)
            buffer[-4096] ^= 1  # the first byte of the last layer

        monkeypatch.setattr(tier.tier, "read", flip)
        load = store.load(found(store, tokens))
        assert load.wait(1) is not checked, "the store's own check"
        assert bool(wrong(load, tokens)) is not checked
        load.release()
