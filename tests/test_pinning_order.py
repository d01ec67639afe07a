"""What clients map of a daemon is pinned once it is mapped, and unpinned before it goes, whoever ends first."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from blocks import WIDE, found, ids, load_all, save, wrong
from daemons import PATIENCE, TIMEOUT, daemon, start, until
from hosted import hosted
from pinned import Ledger, client_of, gauges, pinned, rights

from kvstore.daemon.client import Client
from kvstore.daemon.pinning import Both, Pinning

TOKENS = ids(1, 40)


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    made = Ledger()
    yield made
    assert made.faults == [] and made.pinned == {} and made.threads <= {"kvstore-pins"}


def test_what_is_mapped_is_pinned_and_unpinned_before_it_goes(place: Path, ledger: Ledger) -> None:
    own = Ledger()
    with daemon(place) as running, client_of(running.socket, ledger, own) as client:
        save(client, TOKENS)
        assert load_all(client, [*TOKENS, 0]) == len(TOKENS)
        assert pinned(client) == sum(ledger.pinned.values()) + sum(own.pinned.values())
        assert (ledger.calls, own.calls) == (["r--s"], ["rw-s"])
        with running.connect() as other:  # which has no device
            assert load_all(other, [*TOKENS, 0]) == len(TOKENS) and gauges(other)[0] == 0 < gauges(other)[1]
    assert ledger.pinned == own.pinned == {} and ledger.threads == own.threads == {"kvstore-pins"}
    assert own.faults == []


def test_the_book_keeper_finds_memory_that_went_first(place: Path) -> None:
    ledger = Ledger()
    with daemon(place) as running, client_of(running.socket, ledger) as client:
        save(client, TOKENS)
        pinned(client)
        ledger.pinned[8192] = 4096  # where no process has any
        ledger.unpin(8192)
    assert ledger.faults == ["the memory went first"]


def test_what_the_daemon_gives_back_stays_pinned_as_long_as_somebody_looks(ledger: Ledger) -> None:
    with hosted() as running, client_of(running.path, ledger) as client:
        save(client, TOKENS).wait()
        load = client.load(found(client, TOKENS))
        view, before = load.pieces(0)[0].keys, pinned(client)
        kept = bytes(view)
        load.release()
        connection, residency = client._caller._connection, running.store._residency
        assert connection is not None
        staging = sum(size for address, size in ledger.pinned.items() if rights(address, size) == "rw-s")

        def given_back() -> bool:
            client.forget(older_than=-1e9)
            with residency.lock:
                residency.host.trim()
            client.ping()
            return all(staging for staging, _ in connection._mappings._arenas)

        until(given_back, "the arena stays")
        assert gauges(client)[0] >= before - staging and len(bytes(view)) == len(kept)
        assert [rights(*one) for one in ledger.pinned.items()].count("r--s") == 1
        del view, load
        gc.collect()
        until(lambda: "r--s" not in [rights(*one) for one in list(ledger.pinned.items())], "it stays pinned")


def test_a_new_daemon_s_memory_is_pinned_and_the_old_one_s_until_loads_are_over(place: Path, ledger: Ledger) -> None:
    running = start(place)
    try:
        with client_of(running.socket, ledger) as client:
            save(client, TOKENS)
            load = client.load(found(client, TOKENS))
            pinned(client)
            old = set(ledger.pinned)
            running.kill()
            running = start(place)
            until(lambda: save(client, TOKENS).tokens == len(TOKENS), "the client does not come back")
            assert load_all(client, [*TOKENS, 0]) == len(TOKENS)
            pinned(client)
            assert wrong(load, TOKENS) == [] and len(set(ledger.pinned) - old) == 2
            assert "r--s" in [rights(address, ledger.pinned[address]) for address in old & set(ledger.pinned)]
            load.release()
            del load
            gc.collect()
            until(lambda: not old & set(ledger.pinned), "the old daemon's memory stays pinned")
            assert pinned(client) == sum(ledger.pinned.values())
    finally:
        running.kill()


def test_closing_waits_for_the_pin_under_way_and_for_no_other(place: Path, ledger: Ledger) -> None:
    with daemon(place) as running:
        client = client_of(running.socket, ledger)
        ledger.gate.clear()
        save(client, TOKENS)
        assert ledger.reached.wait(PATIENCE)
        assert load_all(client, [*TOKENS, 0]) == len(TOKENS)  # nobody waits for pins
        assert gauges(client)[0] == 0
        with ThreadPoolExecutor(1) as pool:
            closing = pool.submit(client.close)
            until(lambda: client._lending._pinning._closed)
            ledger.gate.set()
            closing.result(PATIENCE)
        client.close()
    assert len(ledger.calls) == 1


def test_what_is_refused_stays_pageable(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    ledger = Ledger(1, 2)
    with daemon(place) as running, client_of(running.socket, ledger) as client:
        save(client, TOKENS)
        assert load_all(client, [*TOKENS, 0]) == len(TOKENS)
        until(lambda: len(ledger.calls) == 2)
        assert gauges(client)[0] == 0 < gauges(client)[1]
        save(client, ids(2, 40), layout=WIDE)  # of another size: more memory
        until(lambda: bool(ledger.pinned), "one refusal ends it all")
    assert ledger.pinned == {} and [record.levelname for record in caplog.records] == ["WARNING"]


def test_memory_that_came_before_the_device_is_pinned_with_the_next_load(place: Path, ledger: Ledger) -> None:
    devices = list[Both]()
    with daemon(place) as running:
        pinning = Pinning(lambda: devices[0] if devices else None)
        with Client(running.socket, TIMEOUT, None, pinning) as client:
            save(client, TOKENS)
            assert load_all(client, [*TOKENS, 0]) == len(TOKENS)
            assert gauges(client)[0] == 0 < gauges(client)[1] and pinning._thread is None
            devices.append(Both(ledger, ledger))
            assert load_all(client, [*TOKENS, 0]) == len(TOKENS)
            assert pinned(client) == sum(ledger.pinned.values())


def test_the_child_of_a_fork_lets_go_of_memory_and_unpins_none(place: Path, ledger: Ledger) -> None:
    with daemon(place) as running, client_of(running.socket, ledger) as client:
        save(client, TOKENS)
        pinned(client)
        connection = client._caller._connection
        assert connection is not None
        gc.collect()  # what earlier tests left on a device is no business of the child's
        child = os.fork()
        if not child:
            held = dict(ledger.pinned)
            client.close()
            connection._mappings._arenas.clear()
            os._exit(0 if held == ledger.pinned and not any(rights(*one) for one in held.items()) else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert load_all(client, [*TOKENS, 0]) == len(TOKENS) and pinned(client)


def test_without_a_thread_memory_stays_pageable(
    place: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    begin = threading.Thread.start

    def refused(thread: threading.Thread) -> None:
        if thread.name == "kvstore-pins":
            raise RuntimeError("can't start new thread")
        begin(thread)

    with daemon(place) as running, client_of(running.socket, ledger) as client:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refused)
            save(client, TOKENS)
            for _ in range(3):
                assert load_all(client, [*TOKENS, 0]) == len(TOKENS)
        assert gauges(client)[0] == 0 < gauges(client)[1] and len(caplog.records) == 2  # once for each arena
        save(client, ids(2, 40), layout=WIDE)
        until(lambda: bool(ledger.pinned), "the next arena does not try again")
