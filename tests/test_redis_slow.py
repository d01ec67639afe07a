"""Redis behind bad networks: every call is over in time, no byte is ever wrong, and what fails is left alone.

Times are asserted with a lot of slack, since other tests run beside; the benchmark measures them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from blocks import SMALL, WIDE, found, ids, load_all, save, wrong
from gates import PATIENCE
from remotes import MIB, TOKENS, counters, options, redis_of, settled, sharing, tiers
from servers import running

import kvstore
from kvstore.bench.remote.proxy import MODES, Proxy, between
from kvstore.bench.remote.server import Server, wait_until
from kvstore.local import LocalStore
from kvstore.remote import breaker
from kvstore.remote.options import RemoteOptions

SLACK = 2.0  # seconds
LAST = len(SMALL.layers) - 1
DEAD = [mode for mode in MODES if mode not in ("as it is", "50 ms", "500 ms")]
# Three failures at once may take the breaker up to here.
QUICK: dict[str, Any] = {"lookup": 0.02, "timeout": 0.3}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as found:
        yield found


@contextmanager
def far(server: Server, **changes: Any) -> Iterator[tuple[LocalStore, LocalStore, Proxy]]:
    """A store beside Redis that has shared a conversation, one behind a proxy, and the proxy."""
    near = options(server.url, part_bytes=changes.get("part_bytes", 4 * MIB))
    with between(server.port) as proxy, sharing(redis_of(near), near) as one:
        save(one, TOKENS)
        assert one.flush(PATIENCE)
        how = options(proxy.url, prefix=near.prefix, **changes)
        with sharing(redis_of(how), how) as other:
            wait_until(lambda: proxy.passed > 0)  # it has said hello
            yield one, other, proxy


def is_open(store: LocalStore) -> bool:
    return bool(store.stats()["gauges"]["remote_breaker_open"])


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "as it is"])
def test_a_match_never_waits_longer_than_it_may(server: Server, mode: str) -> None:
    with far(server, **QUICK) as (_, other, proxy):
        proxy.mode = mode
        seed = 100
        while not is_open(other):
            begin = time.monotonic()
            assert tiers(other, ids(seed, 64)) == {}
            assert time.monotonic() - begin < QUICK["lookup"] + SLACK
            seed += 1
            assert seed < 100 + 200
        assert counters(other)["remote_breaker_opens"] == 1
        before = counters(other).get("remote_lookups", 0)
        for _ in range(20):
            seed += 1
            assert tiers(other, ids(seed, 64)) == {}
        assert counters(other).get("remote_lookups", 0) <= before + 1  # one at most tries again


@pytest.mark.parametrize("mode", MODES)
def test_a_load_is_back_in_time_and_right(server: Server, mode: str) -> None:
    with far(server, timeout=1.5) as (_, other, proxy):
        match = found(other, TOKENS)
        assert match.tokens_by_tier["remote"] == 64
        proxy.mode = mode
        begin, load = time.monotonic(), other.load(match)
        done = load.wait(LAST, timeout=2.5)
        assert time.monotonic() - begin < 2.5 + SLACK
        assert wrong(load, TOKENS) == []
        if mode not in DEAD:
            assert done and load.good_tokens(LAST) == 64
        elif mode != "wrong bytes":  # of which some may be right
            assert load.good_tokens() == 0
        load.release()
        settled(other)


@pytest.mark.parametrize("mode", DEAD)
def test_three_loads_that_fail_open_the_breaker(server: Server, mode: str) -> None:
    with far(server, timeout=0.3) as (one, other, proxy):
        matches = []
        for seed in range(3):
            save(one, ids(seed + 50, 64))
            assert one.flush(PATIENCE)
            matches.append(found(other, ids(seed + 50, 64)))
        proxy.mode = mode
        for at, match in enumerate(matches):
            load = other.load(match)
            assert wrong(load, ids(at + 50, 64)) == []
            load.release()
            settled(other)
        wait_until(lambda: is_open(other))
        begin = time.monotonic()
        assert tiers(other, TOKENS) == {} and time.monotonic() - begin < SLACK


def test_when_it_answers_again_it_is_asked_again(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breaker, "FIRST", 0.05)
    with far(server, timeout=0.3) as (_, other, proxy):
        proxy.mode = "reset"
        for seed in range(100, 103):
            tiers(other, ids(seed, 64))
        wait_until(lambda: is_open(other))
        proxy.mode = "as it is"
        wait_until(lambda: tiers(other, TOKENS) == {"remote": 64})
        assert load_all(other, [*TOKENS, 0]) == 64 and not is_open(other)


def test_a_late_answer_serves_the_next_who_asks(server: Server) -> None:
    with far(server, lookup=0.1, timeout=5.0) as (_, other, proxy):
        proxy.mode = "500 ms"
        assert tiers(other, TOKENS) == {} and counters(other)["remote_late_lookups"] == 1
        proxy.mode = "as it is"
        wait_until(lambda: tiers(other, TOKENS) == {"remote": 64})
        assert counters(other)["remote_lookups"] == 1


@pytest.mark.parametrize("mode", ["black hole", "reset", "1 byte/s"])
def test_saves_do_not_wait_and_drops_are_counted(server: Server, mode: str) -> None:
    with far(server, timeout=0.3) as (_, other, proxy):
        proxy.mode = mode
        begin = time.monotonic()
        for seed in range(200, 260):
            save(other, ids(seed, 64))
        assert time.monotonic() - begin < 3 * SLACK
        assert other.flush(PATIENCE)
        assert counters(other)["remote_dropped_writes"] > 100 and is_open(other)
        assert len(other._residency.index.leases) == 0


def test_what_cannot_be_erased_now_is_erased_when_it_answers(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breaker, "FIRST", 0.05)
    with far(server, timeout=0.3) as (one, other, proxy):
        assert load_all(other, [*TOKENS, 0]) == 64
        settled(other)
        assert other.flush(PATIENCE)
        proxy.mode = "reset"
        receipt = other.forget(tenant="")
        assert (receipt.blocks, receipt.deferred, receipt.remote_blocks) == (4, 1, 0)
        assert other.stats()["gauges"]["remote_pending_erases"] == 1
        one.forget(tenant="nobody")  # has nothing to do with it
        assert tiers(other, TOKENS) == {}
        for seed in range(100, 103):
            tiers(other, ids(seed, 64))
        proxy.mode = "as it is"

        def erased() -> bool:
            tiers(other, ids(time.monotonic_ns() % 1000000, 64))  # whoever asks finds out that it answers
            return bool(other.stats()["gauges"]["remote_pending_erases"] == 0)

        wait_until(erased)
        assert counters(other)["remote_erased_blocks"] == 4


def test_a_server_that_dies_under_a_load_is_a_miss() -> None:
    tokens = ids(5, 256)  # 48 parts
    with running() as server, far(server, part_bytes=WIDE.payload_bytes(32) // 6) as (one, other, proxy):
        save(one, tokens, layout=WIDE)
        assert one.flush(PATIENCE)
        match = found(other, tokens, layout=WIDE)
        proxy.mode = "50 ms"
        before, load = proxy.passed, other.load(match)
        wait_until(lambda: proxy.passed > before + MIB // 2)
        server.kill()
        proxy.cut()
        assert not load.wait(5, timeout=5.0) and wrong(load, tokens) == []
        load.release()
        settled(other)
        assert load_all(other, [*tokens, 0], layout=WIDE) < 256


def test_nobody_waits_for_a_server_that_is_not_there() -> None:
    begin = time.monotonic()
    with kvstore.open(host="8MiB", redis="redis://127.0.0.1:1/0") as store:
        assert time.monotonic() - begin < SLACK
        save(store, TOKENS)
        assert load_all(store, [*TOKENS, 0]) == 64
        assert store.flush(PATIENCE)
    assert time.monotonic() - begin < PATIENCE  # not forever, however busy the machine is


def test_closing_does_not_wait_for_a_server_that_is_silent(server: Server) -> None:
    with between(server.port) as proxy:
        how = options(proxy.url, timeout=30.0)
        proxy.mode = "black hole"
        store = kvstore.open(host="8MiB", redis=how)
        wait_until(lambda: proxy.connections > 0)
        begin = time.monotonic()
        store.close()
        assert time.monotonic() - begin < SLACK


def test_a_budget_of_memory_that_a_server_keeps_is_its_own_business() -> None:
    """Redis lets keys go as it likes: what is left is right, and nothing fails."""
    with running("--maxmemory", "2mb", "--maxmemory-policy", "allkeys-random") as server:
        how = RemoteOptions(server.url, lookup=5.0)
        with sharing(redis_of(how), how, host=8 * MIB) as one, sharing(redis_of(how), how) as other:
            for seed in range(40):
                save(one, ids(seed, 64))
                assert one.flush(PATIENCE)
            loaded = [load_all(other, [*ids(seed, 64), 0]) for seed in range(40)]
            assert 0 < sum(loaded) < 40 * 64
            settled(other)
