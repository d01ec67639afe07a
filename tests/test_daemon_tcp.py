"""Clients from other machines: TLS and a token, bytes through the connection, and every way in which that can break."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from blocks import NS, ODD, SMALL, WIDE, drafts, found, ids, load_all, recount, save, wrong
from daemons import until
from hosted import TIMEOUT
from outside import Outside, Papers, Raw, outside, papers

import kvstore
from kvstore import BadInput, Layout, Unreachable
from kvstore.bench.remote.proxy import Proxy, between
from kvstore.daemon.door import STRANGERS
from kvstore.daemon.pieces import MAX_PART

TOKEN = "the token of tenant a"
CHAIN = ids(3, 40 * 32 + 5)  # 40 blocks of 192 KiB, and a partial one
SLACK = 5.0  # seconds beyond a deadline, on a machine that does other things too


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Papers:
    return papers(tmp_path_factory.mktemp("papers"))


@pytest.fixture
def here(made: Papers) -> Iterator[Outside]:
    """A daemon with a door, and memory for all that these tests save."""
    with outside(made, host=64 << 20) as daemon:
        yield daemon


@pytest.fixture
def proxied(here: Outside) -> Iterator[Proxy]:
    """In front of a daemon that has ``CHAIN``."""
    with here.connect() as store:
        assert save(store, CHAIN, layout=WIDE).tokens == len(CHAIN)
    with between(here.port) as proxy:
        yield proxy


# -- what comes and goes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [SMALL, WIDE, ODD], ids=["small", "wide", "odd"])
def test_what_is_saved_is_loaded_and_only_by_its_tenant(
    here: Outside, layout: Layout, caplog: pytest.LogCaptureFixture
) -> None:
    count = 7 * layout.block_tokens + 3
    with here.connect() as one, here.connect() as two, here.connect("the token of tenant b") as other:
        for seed in range(3):
            saved = save(one, ids(seed, count), layout=layout)
            assert (saved.tokens, saved.new_tokens) == (count, count)
        for store, most in ((one, count), (two, count), (other, 0)):
            assert load_all(store, [*ids(1, count), 0], layout=layout) == most
        assert load_all(two, ids(2, count - layout.block_tokens), layout=layout) == count - layout.block_tokens - 1
        with here.hosted.connect() as local:  # it is tenant a, too
            assert load_all(local, [*ids(0, count), 0], layout=layout) == count
            assert save(local, ids(9, count), layout=layout).tokens == count
        assert load_all(one, [*ids(9, count), 0], layout=layout) == count
        assert other.stats()["tiers"]["host"]["blocks"] == 0
    until(lambda: not here.sessions)
    assert recount(here.hosted.tenants["a"].store) == [] and not caplog.text


def test_blocks_that_are_on_disk_come_too_and_saves_are_durable(made: Papers, tmp_path: Path) -> None:
    with outside(made, tmp_path) as before, before.connect() as store:
        durable = save(store, CHAIN, layout=WIDE).wait(TIMEOUT)
        assert durable.tokens == len(CHAIN)
    with outside(made, tmp_path) as after, after.connect() as store:
        match = found(store, CHAIN, layout=WIDE)
        assert set(match.tiers) == {"disk"}
        load = store.load(match)
        assert wrong(load, CHAIN) == [] and load.good_tokens(5) == len(CHAIN)
        assert load.tokens_by_tier(len(CHAIN))["disk"] == len(CHAIN) and load.fetched(5) is not None
        load.release()
        assert store.verify() == [] and store.flush(TIMEOUT)


def test_other_verbs_are_the_same(here: Outside) -> None:
    with here.connect() as store:
        save(store, CHAIN, layout=WIDE, owner="somebody")
        match = found(store, CHAIN, layout=WIDE)
        assert store.prospect([match]).layers == len(WIDE.layers)
        answers = store.schedule([kvstore.Job("first", match=match)])
        assert answers[0].tokens == len(CHAIN)
        assert store.pin(match, seconds=60.0).tokens == len(CHAIN)
        match.release()
        store.remember("note", "text")
        assert store.recall("note") == "text" and store.segments()[0].owner == "somebody"
        assert store.forget(owner="somebody").blocks == 41
        assert load_all(store, CHAIN, layout=WIDE) == 0


def test_asyncio(here: Outside) -> None:
    async def told() -> int:
        options = {"token": TOKEN, "ca": here.papers.certificate, "timeout": TIMEOUT}
        async with await kvstore.aconnect(f"tls://localhost:{here.port}", **options) as store:  # type: ignore[arg-type]
            load = await store.load(await store.match(NS, SMALL, [*ids(1, 40), 0]))
            buffer = bytearray(1 << 20)
            return await store.read_into(load, memoryview(buffer), check=True)

    with here.connect() as store:
        assert save(store, ids(1, 40)).tokens == 40
    assert asyncio.run(told()) == 3 * SMALL.payload_bytes(16)


def test_memory_here_is_bounded_and_used_again(here: Outside) -> None:
    with here.connect(buffer="1MiB") as store:
        assert len(drafts(store, NS, WIDE, CHAIN)) == 5  # of 200 KiB each; and they are dropped
        for start in (0, 5, 10):
            tokens = CHAIN[: (start + 5) * 32]
            assert save(store, tokens, layout=WIDE).tokens == len(tokens)
        for _ in range(5):
            match = found(store, CHAIN, layout=WIDE)
            load = store.load(match)
            assert (match.tokens, load.tokens) == (15 * 32, 5 * 32)
            assert wrong(load, CHAIN) == [] and load.good_tokens(5) == 5 * 32
            load.release()


# -- who comes in ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["no token of anybody's", "", None])
def test_who_has_no_token_is_refused(here: Outside, token: str | None, caplog: pytest.LogCaptureFixture) -> None:
    with Raw(here, token) as raw:
        assert raw.welcome[0] == "BadInput" and "token" in raw.welcome[1]
        with pytest.raises(OSError, match="closed"):
            raw.read(raw.first)
    assert here.hosted.server.refused == 1 and here.sessions == 0
    assert "is refused" in caplog.text and "anybody" not in caplog.text
    with pytest.raises((Unreachable, BadInput)):
        here.connect(token)  # type: ignore[arg-type]
    with Raw(here) as raw:  # the control
        assert raw.welcome[3] == "a"


@pytest.mark.parametrize("names", ["DNS:elsewhere", "DNS:localhost"])
def test_a_daemon_that_is_somebody_else_is_not_spoken_to(here: Outside, tmp_path: Path, names: str) -> None:
    other = papers(tmp_path / "other", names)
    trusted = other.certificate if names == "DNS:localhost" else here.papers.certificate
    place = "localhost" if names == "DNS:localhost" else "127.0.0.2"  # which its certificate does not name
    with pytest.raises(Unreachable, match="trusted"):
        kvstore.connect(f"tls://{place}:{here.port}", token=TOKEN, ca=trusted, timeout=TIMEOUT)
    assert here.sessions == 0


def test_what_is_no_place_is_said(made: Papers, tmp_path: Path) -> None:
    for url in ("tls://", "tls://host", "tls://host:port", "tls://me@host:1", "tls://host:1/path"):
        with pytest.raises(BadInput, match="tls://host:port"):
            kvstore.connect(url, token=TOKEN)
    with pytest.raises(BadInput, match="token"):
        kvstore.connect("tls://localhost:1")
    with pytest.raises(BadInput, match="certificates"):
        kvstore.connect("tls://localhost:1", token=TOKEN, ca=tmp_path / "none.pem")
    with pytest.raises(BadInput, match="buffer"):
        kvstore.connect("tls://localhost:1", token=TOKEN, ca=made.certificate, buffer="much")
    with pytest.raises(Unreachable, match="localhost:1"):
        kvstore.connect("tls://localhost:1", token=TOKEN, ca=made.certificate)


def test_plain_text_and_a_wrong_second_connection_are_refused(here: Outside) -> None:
    with socket.create_connection(("127.0.0.1", here.port)) as plain:
        plain.sendall(b"GET / HTTP/1.1\r\nHost: kvstore\r\n\r\n")
        plain.settimeout(TIMEOUT)
        with contextlib.suppress(ConnectionResetError):
            while plain.recv(1000):
                pass
    until(lambda: here.hosted.server.refused == 1)
    with Raw(here) as raw:
        secret = raw.welcome[4]["join"]
        for told in (secret, b"\0" * 16):  # it was used already, and another
            other = raw._dial()
            assert raw.ask(other, "join", told)[0] == "BadInput"
            other.close()
        assert raw.ask(raw.first, "ping")[0] is None
    assert here.hosted.server.refused == 3


def test_strangers_keep_nobody_out(here: Outside) -> None:
    crowd = [socket.create_connection(("127.0.0.1", here.port)) for _ in range(STRANGERS + 20)]
    try:
        with here.connect() as store, here.hosted.connect() as local:
            assert store.ping() > 0 and local.ping() > 0
        assert len(here.door._strangers) <= STRANGERS
    finally:
        for each in crowd:
            each.close()


# -- what is asked for -----------------------------------------------------------------------------------------------


def test_only_bytes_of_ones_own_loads_are_given(here: Outside) -> None:
    with here.connect() as store:
        assert save(store, CHAIN, layout=WIDE).tokens == len(CHAIN)
    whole = WIDE.payload_bytes(32)
    with Raw(here) as raw, Raw(here, "the token of tenant b") as other:
        name = raw.load(CHAIN)
        data, sums = raw.ask(raw.second, name, [[0, 0, whole]])
        assert len(data) == whole and len(sums[0]) == 8 * len(WIDE.pieces(32))
        part, known = raw.ask(raw.second, name, [[0, 8, 8], [0, 0, WIDE.layer_offsets(32)[1]]])
        assert part == data[8:16] + data[: WIDE.layer_offsets(32)[1]] and known == [b"", sums[0][: 4 * 8]]
        beyond = [[41, 0, 8]], [[0, whole - 7, 8]], [[0, 1 << 62, 8]], [[0, 0, 0]], [[0, 0, MAX_PART + 1]], [[0, 0]]
        for ranges in (*beyond, [["0", 0, 8]], [[0, 0, whole]] * 6, [[0, 0, 1]] * 1025):
            assert raw.ask(raw.second, name, ranges)[0] == "BadInput", ranges
        assert other.ask(other.second, name, [[0, 0, 8]])[0] == "BadInput"
        for arguments in ((1, 0, b"12"), (1, 0, b"1" * (MAX_PART + 1)), (1 << 40, 0, b"")):
            assert raw.ask(raw.first, "put", *arguments)[0] == "BadInput"
        assert here.sessions == 2
    with here.hosted.connect() as local:
        local.drafts(WIDE, 1)
        with pytest.raises(BadInput, match="in place"):
            local._caller.call("put", 1, 0, b"12")


def test_who_does_not_read_is_dropped(here: Outside, caplog: pytest.LogCaptureFixture) -> None:
    with here.connect() as store:
        assert save(store, CHAIN, layout=WIDE).tokens == len(CHAIN)
        with Raw(here) as raw:
            name = raw.load(CHAIN)
            asked = [[0, 0, WIDE.payload_bytes(32)]]
            with contextlib.suppress(OSError):
                for _ in range(400):  # 75 MiB: more than any socket holds
                    raw.send(raw.second, name, asked)
            until(lambda: here.sessions == 1 and "bytes unread" in caplog.text)
        assert load_all(store, CHAIN, layout=WIDE) == len(CHAIN) - 1


# -- what breaks -----------------------------------------------------------------------------------------------------


def test_bytes_that_changed_over_there_are_a_miss(here: Outside, caplog: pytest.LogCaptureFixture) -> None:
    with here.connect() as store:
        save(store, CHAIN, layout=WIDE)
        residency = here.hosted.tenants["a"].store._residency
        match = found(store, CHAIN, layout=WIDE)
        third = residency.residents[match.blocks[2][0]].address
        residency.host.view(third)[WIDE.header_bytes + WIDE.layer_offsets(32)[4]] ^= 1
        load = store.load(match)
        assert wrong(load, CHAIN) == []
        assert (load.good_tokens(2), load.good_tokens(4)) == (len(CHAIN), 2 * 32)  # layers 3 and 4 came together
        load.release()
    until(lambda: "other bytes than were saved" in caplog.text)


def test_a_connection_that_drops_in_mid_load_leaves_what_has_come(here: Outside, proxied: Proxy) -> None:
    with here.connect(port=proxied.port) as store:
        match = found(store, CHAIN, layout=WIDE)
        proxied.mode = "500 ms"
        load = store.load(match)
        assert load.wait(0)
        proxied.cut()
        assert not load.wait(5) and load.good_tokens(0) == len(CHAIN) > load.good_tokens(5)
        assert wrong(load, CHAIN) == []
        proxied.mode = "as it is"
        until(lambda: load_all(store, CHAIN, layout=WIDE) == len(CHAIN) - 1)
        load.release()


@pytest.mark.parametrize("mode", ["black hole", "1 byte/s", "reset", "wrong bytes", "half-open", "garbage"])
def test_a_bad_network_is_a_miss_in_time(
    here: Outside, proxied: Proxy, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    with here.connect(port=proxied.port, timeout=0.5) as store:
        until(lambda: load_all(store, CHAIN, layout=WIDE) == len(CHAIN) - 1)
        match = found(store, CHAIN, layout=WIDE)
        load = store.load(match)
        proxied.mode = mode
        before = time.monotonic()
        load.wait(5)  # whatever has come, the rest is not waited for
        assert wrong(load, CHAIN) == []
        assert time.monotonic() - before < 0.5 + SLACK
        before = time.monotonic()
        assert found(store, [*CHAIN, 1], layout=WIDE).tokens == 0
        assert save(store, ids(77, 64), layout=WIDE).tokens == 0
        assert time.monotonic() - before < 3 * 0.5 + SLACK
        load.release()
        proxied.mode = "as it is"
        until(lambda: load_all(store, CHAIN, layout=WIDE) == len(CHAIN) - 1)
