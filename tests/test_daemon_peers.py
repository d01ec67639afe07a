"""Peers that are slow, silent, greedy or out of turn: each costs itself its connection, and nobody else anything."""

from __future__ import annotations

import array
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from blocks import NS, SMALL, ids, load_all, save
from daemons import until
from gates import PATIENCE
from hosted import Hosted, HostedClient, hosted
from mutations import framed, head
from peers import Peer
from processes import memory

from kvstore.daemon import link
from kvstore.daemon.link import AT_ONCE, UNREAD
from kvstore.daemon.packed import pack_namespace, packed_layout
from kvstore.daemon.server import MAX_HELLO, MAX_WAITS
from kvstore.daemon.wire import HEADER, MAX_BODY, VERSION, Kind
from kvstore.local import LocalStore

TOKENS = ids(3, 64)


@pytest.fixture
def here() -> Iterator[Hosted]:
    with hosted(lease_ttl=60.0) as daemon:
        yield daemon


@pytest.fixture
def client(here: Hosted) -> Iterator[HostedClient]:
    """One that behaves, and has something stored; it must be served to the end."""
    with here.connect() as client:
        save(client, TOKENS)
        number = client.session.number
        yield client
        assert load_all(client, [*TOKENS, 0]) == 64
        assert client.session.number == number


@pytest.mark.parametrize("greeted", [False, True])
def test_a_length_beyond_the_bound_is_refused_before_anything_is_taken(
    client: HostedClient, greeted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "PATIENCE", 3600.0)
    monkeypatch.setattr(link, "GREETING", 3600.0)
    with Peer(client.hosted.path, greet=greeted) as peer:
        peer.send(head((MAX_BODY if greeted else MAX_HELLO) + 1, 0))
        with pytest.raises(EOFError):
            peer.read()


def test_what_is_announced_takes_no_memory_before_it_comes(client: HostedClient) -> None:
    before = memory(os.getpid())
    with ExitStack() as stack:
        for _ in range(100):
            peer = stack.enter_context(Peer(client.hosted.path))
            peer.send(head(MAX_BODY, 0) + b"\x00")
        assert client.ping() < PATIENCE  # the daemon has read them all
        assert memory(os.getpid()) - before < 100 * 2 * AT_ONCE


def test_who_says_nothing_or_little_at_a_time_is_dropped(client: HostedClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hundred connections: some say nothing, some a byte now and then, some half of a request after their hello."""
    monkeypatch.setattr(link, "GREETING", 0.5)
    monkeypatch.setattr(link, "PATIENCE", 0.5)
    with ExitStack() as stack:
        peers = [stack.enter_context(Peer(client.hosted.path, greet=number % 4 == 0)) for number in range(200)]
        beat = framed([[], [], [], 0.0], 0, Kind.EVENT)
        for peer in peers:
            assert peer.events is None or peer.events.send(beat)
        bytes_of = {peer: iter(head(MAX_HELLO, 0) + bytes(MAX_HELLO)) for peer in peers[::2]}
        alive, pause = set(bytes_of), threading.Event()
        for _ in range(1000):
            alive = {peer for peer in alive if peer.send(bytes([next(bytes_of[peer])]))}
            if not alive:
                break
            pause.wait(0.01)
            assert load_all(client, [*TOKENS, 0]) == 64
        assert not alive, "who sends a byte now and then goes on for ever"
        until(lambda: not client.hosted.server._links, "who says nothing stays")


def test_a_session_that_says_nothing_more_is_over_after_its_time() -> None:
    with hosted(lease_ttl=0.3) as here, Peer(here.path) as silent, here.connect() as client:
        silent.sock.settimeout(PATIENCE)
        assert silent.sock.recv(1) == b""
        assert client.ping() < PATIENCE and len(here.server.sessions) == 1


def test_who_does_not_read_is_dropped_with_little_left_unread(client: HostedClient) -> None:
    here = client.hosted
    with Peer(here.path) as peer:
        until(lambda: len(here.server.sessions) == 2)
        session = here.server.sessions[max(here.server.sessions)]
        most = 0
        while not session.ended:
            peer.send(framed(["stats"]) * 20)
            most = max(most, here.do(lambda: session.link.unread))
        assert most <= UNREAD + 64 * 1024


def test_events_that_are_not_read_are_no_way_round(client: HostedClient) -> None:
    here = client.hosted
    with Peer(here.path):
        until(lambda: len(here.server.sessions) == 2)
        session = here.server.sessions[max(here.server.sessions)]
        sent = 0
        while not session.ended:
            here.do(lambda: session.tell("progress", 1, b"x" * 100_000))
            sent += 100_000
            assert sent < 3 * UNREAD


def test_one_answer_may_be_larger_than_what_may_be_left_unread(client: HostedClient) -> None:
    here = client.hosted
    with Peer(here.path) as peer:
        until(lambda: len(here.server.sessions) == 2)
        session = here.server.sessions[max(here.server.sessions)]
        here.do(lambda: session.link.send(Kind.ANSWER, 7, b"x" * (3 * UNREAD)))
        assert peer.read()[1:] == (7, b"x" * (3 * UNREAD))


def test_descriptors_that_a_client_sends_are_not_kept(client: HostedClient) -> None:
    reader, writer = os.pipe()
    try:
        with Peer(client.hosted.path) as peer:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [writer] * 100))]
            peer.sock.sendmsg([framed(["ping"])], rights)
            assert peer.read()[2] == [None, []]
            os.close(writer)
            writer = -1
            assert os.read(reader, 1) == b"", "somebody holds the other end"
    finally:
        os.close(reader)
        if writer >= 0:
            os.close(writer)


@pytest.mark.parametrize(
    "frame",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        head(0, 0, version=VERSION + 1),
        head(0, 0, kind=9),
        head(5, 12345) + b"\x91\xa1abc"[:5],
        HEADER.pack(b"KVSD", VERSION, 1, 7, 1, 0, 0),
        framed(["ping"]),
        framed(["hello"], kind=Kind.EVENT),
        framed(["hello", VERSION, 7]),
        framed(["hello", VERSION, None, "more"]),
    ],
)
def test_a_first_frame_that_is_no_hello_ends_the_connection(client: HostedClient, frame: bytes) -> None:
    with Peer(client.hosted.path, greet=False) as peer:
        peer.send(frame)
        assert not peer.answered() or (peer.fds == [] and not peer.answered())
    assert len(client.hosted.server.sessions) == 1


def test_there_are_no_more_sessions_than_the_daemon_takes() -> None:
    with hosted(max_sessions=4) as here:
        with here.connect() as client, ExitStack() as stack:
            for _ in range(3):
                stack.enter_context(Peer(here.path))
            for _ in range(10):
                with Peer(here.path, greet=False) as more:
                    assert not more.answered()
            assert client.ping() < PATIENCE
        until(lambda: not here.server.sessions)
        with here.connect() as client:
            assert client.ping() < PATIENCE


def test_what_is_asked_behind_a_save_waits_for_it(client: HostedClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when something that takes long is over meanwhile."""
    flushing, saving, begun = threading.Event(), threading.Event(), threading.Event()
    flush, publish = LocalStore.flush, LocalStore.save

    def slow_flush(store: LocalStore, timeout: float | None = None) -> bool:
        return flushing.wait(PATIENCE) and flush(store, timeout)

    def slow_save(*arguments: object, **options: object) -> object:
        begun.set()
        assert saving.wait(PATIENCE)
        return publish(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(LocalStore, "flush", slow_flush)
    monkeypatch.setattr(LocalStore, "save", slow_save)
    space, layout, tokens = pack_namespace(NS), packed_layout(SMALL), bytes(4 * 16)
    here = client.hosted
    with Peer(here.path) as peer:
        session = here.server.sessions[max(here.server.sessions)]
        asked = peer.ask("drafts", layout, 1, number=1)
        given = [[0, asked[0][0][0], False]]
        assert peer.ask("flush", None, number=2)[0] == 2
        assert peer.ask("save", space, layout, tokens, given, None, "", None, "", "pre", None, number=3)[0] == 3
        peer.send(framed(["match", space, layout, tokens, None, 0, True], 4))
        assert begun.wait(PATIENCE)
        flushing.set()
        assert peer.event()[:2] == ["done", 2]
        assert here.do(lambda: session.link._held), "the next request did not wait"
        saving.set()
        kind, number, value = peer.read()
        assert (kind, number, value[0][1]) == (Kind.ANSWER, 4, 16)
        assert peer.event()[:2] == ["done", 3]


def test_a_client_cannot_wait_for_more_than_there_is_room_for(
    client: HostedClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = threading.Event()
    monkeypatch.setattr(LocalStore, "flush", lambda store, timeout: over.wait(PATIENCE))
    with Peer(client.hosted.path) as peer:
        answers = [peer.ask("flush", None, number=number) for number in range(1, 400)]
        refused = [answer for answer in answers if answer[0] == "BadInput"]
        assert len(refused) == 399 - MAX_WAITS
        over.set()
        for _ in range(MAX_WAITS):
            peer.event()
        assert peer.ask("flush", None, number=500)[0] == 500
        peer.event()
