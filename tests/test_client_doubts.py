"""A daemon that lies, breaks off or falls silent: its clients miss, in time, and keep nothing open."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from blocks import SMALL, found, ids
from daemons import PATIENCE
from mutations import framed, head

import kvstore
from kvstore.daemon.arenas import create
from kvstore.daemon.packed import pack_match
from kvstore.daemon.wire import HEADER, MAX_ANSWER, VERSION, Kind, head_of, unpack
from kvstore.kinds import Origin
from kvstore.lease import Lease
from kvstore.match import Match, Miss
from kvstore.tiers.slab import SLOT_BITS

TOKENS = ids(1, 32)
TIMEOUT = 0.3
Answer = Callable[["Fake", socket.socket, int, list[object]], None]


class Fake:
    """Listens like a daemon; ``answers`` says what it does about a verb, "hello" among them."""

    def __init__(self, path: Path, answers: dict[str, Answer]) -> None:
        self._answers, self._path = answers, path
        self._stack = contextlib.ExitStack()
        self._listener = self._stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        self._listener.bind(str(path))
        self._listener.listen()
        self.over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        """Ends it."""
        self.over.set()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as last:
            last.connect(str(self._path))
        self._thread.join()
        self._stack.close()

    def _run(self) -> None:
        threads = list[threading.Thread]()
        while not self.over.is_set():
            sock = self._stack.enter_context(self._listener.accept()[0])
            sock.settimeout(PATIENCE)
            threads.append(threading.Thread(target=self._serve, args=(sock,)))
            threads[-1].start()
        for thread in threads:
            thread.join()

    def _serve(self, sock: socket.socket) -> None:
        while not self.over.is_set():
            try:
                asked = head_of(sock.recv(HEADER.size, socket.MSG_WAITALL) or b"", MAX_ANSWER)
                verb, *arguments = unpack(asked, sock.recv(asked.length, socket.MSG_WAITALL))
                self._answers.get(verb, _nothing)(self, sock, asked.number, arguments)
            except Exception:  # whatever it is, this daemon says no more
                sock.close()
                return

    def greet(self, sock: socket.socket, version: int = VERSION) -> None:
        """A hello as it should be."""
        ours, theirs = socket.socketpair()
        self._stack.enter_context(ours)
        page, mapping = create("page", 4096, writable=False)
        mapping[0] = 1
        said = [version, "epoch", 1, "", {"ttl": 10.0, "frame": 1 << 20}]
        socket.send_fds(sock, [framed(said, 1, Kind.ANSWER)], [theirs.fileno(), page])
        theirs.close()
        os.close(page)


def _nothing(fake: Fake, sock: socket.socket, number: int, arguments: list[object]) -> None:
    pass


def _greets(fake: Fake, sock: socket.socket, number: int, arguments: list[object]) -> None:
    fake.greet(sock)


@contextmanager
def faked(**answers: Answer) -> Iterator[str]:
    """A daemon that answers so; where it is."""
    with tempfile.TemporaryDirectory(prefix="kvstore-fake-") as folder:
        fake = Fake(Path(folder) / "s", {"hello": _greets, **answers})
        try:
            yield f"unix:{folder}/s"
        finally:
            fake.close()


def says(data: bytes, fds: int = 0) -> Answer:
    """Sends these bytes, and so many descriptors of nothing in particular."""

    def answer(fake: Fake, sock: socket.socket, number: int, arguments: list[object]) -> None:
        reader, writer = os.pipe()
        socket.send_fds(sock, [data], [reader] * fds) if fds else sock.sendall(data)
        os.close(reader)
        os.close(writer)

    return answer


def closes(fake: Fake, sock: socket.socket, number: int, arguments: list[object]) -> None:
    raise ConnectionAbortedError


WRONG = {
    "silence": _nothing,
    "an end": closes,
    "no frame": says(b"\0" * 100),
    "half a frame": says(framed([1, []], 1, Kind.ANSWER)[:-3]),
    "a broken frame": says(head(3, 5, 1, Kind.ANSWER) + b"\x93\1\2"),
    "too long a frame": says(head(MAX_ANSWER + 1, 5, 1, Kind.ANSWER)),
    "another kind": says(head(0, 0, 1, 77)),
    "another version": says(head(0, 0, 1, Kind.ANSWER, VERSION + 1)),
}


@pytest.mark.parametrize("how", WRONG)
def test_a_daemon_that_does_not_greet_well_is_none(how: str) -> None:
    with faked(hello=WRONG[how]) as url, pytest.raises(kvstore.Unreachable):
        kvstore.connect(url, timeout=TIMEOUT)


@pytest.mark.parametrize("fds", [0, 1, 2, 3])
def test_a_greeting_with_other_descriptors_is_none(fds: int) -> None:
    said = framed([VERSION, "epoch", 1, "", {"ttl": 10.0, "frame": 1 << 20}], 1, Kind.ANSWER)
    with faked(hello=says(said, fds)) as url, pytest.raises(kvstore.Unreachable):
        kvstore.connect(url, timeout=TIMEOUT)


def test_a_daemon_of_another_version_is_named() -> None:
    def greets(fake: Fake, sock: socket.socket, number: int, arguments: list[object]) -> None:
        fake.greet(sock, VERSION + 1)

    with faked(hello=greets) as url, pytest.raises(kvstore.Unreachable, match="version"):
        kvstore.connect(url, timeout=TIMEOUT)


@pytest.mark.parametrize("how", WRONG)
def test_a_daemon_that_does_not_answer_well_is_a_miss_in_time(how: str) -> None:
    wrong = WRONG[how]
    with (
        faked(match=wrong, drafts=wrong, save=wrong, stats=wrong) as url,
        kvstore.connect(url, timeout=TIMEOUT) as client,
    ):
        begin = time.monotonic()
        assert (found(client, TOKENS).tokens, client.drafts(SMALL, 1)) == (0, [])
        saved = client.save(kvstore.Namespace(kvstore.Fingerprint({"a": "b"})), SMALL, TOKENS, {})
        assert saved.tokens == 0
        with pytest.raises(kvstore.Unreachable):
            client.stats()
        assert time.monotonic() - begin < 4 * TIMEOUT + 2.0


def test_answers_to_what_nobody_asked_are_passed_over() -> None:
    def pings(fake: Fake, sock: socket.socket, number: int, arguments: list[object]) -> None:
        for other in (number + 5, 0, number - 1, number):
            sock.sendall(framed([None, []], other, Kind.ANSWER))

    with faked(ping=pings) as url, kvstore.connect(url, timeout=TIMEOUT) as client:
        assert client.ping() < PATIENCE and client.ping() < PATIENCE


def matches(fake: Fake, sock: socket.socket, number: int, arguments: list[object]) -> None:
    lease = Lease((), lambda _: None)
    blocks, tiers, origins = [(1, 16), (2, 16)], ["host", "host"], [Origin(), Origin()]
    match = Match(SMALL, blocks, lease, 32, tiers, Miss("complete", 32, ""), b"", origins=origins)
    sock.sendall(framed([pack_match(match, 7), []], number, Kind.ANSWER))


@pytest.mark.parametrize("sent", ["loose", "short", "writable", "none", "pipes", "too many"])
def test_memory_that_is_not_as_it_should_be_ends_the_load(sent: str) -> None:
    """What could be taken away below a reader, or written by others, is not read."""
    size = SMALL.full_slot_bytes
    arena = 1 << SLOT_BITS

    def loads(fake: Fake, sock: socket.socket, number: int, arguments: list[object]) -> None:
        sources = [[block, 16, arena + block, (block - 1) * size, 16, "pre", None] for block in (1, 2)]
        said = framed([[7, sources], [[False, 1, 2 * size]]], number, Kind.ANSWER)
        fds = memory(sent, 2 * size)
        socket.send_fds(sock, [said], fds) if fds else sock.sendall(said)
        for fd in fds:
            os.close(fd)

    with faked(match=matches, load=loads) as url, kvstore.connect(url, timeout=TIMEOUT) as client:
        load = client.load(found(client, TOKENS))
        assert load.tokens == (32 if sent == "too many" else 0)
        assert load.read_into(memoryview(bytearray(2 * size))) == load.tokens // 16 * SMALL.payload_bytes(16)
        load.release()


def memory(kind: str, size: int) -> list[int]:
    """Descriptors that a daemon should not send."""
    if kind == "none":
        return []
    if kind == "pipes":
        reader, writer = os.pipe()
        return [reader, writer]
    if kind == "loose":
        fd = os.memfd_create("loose", os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, size)
        return [fd]
    fd, mapping = create("arena", size // 2 // 4096 * 4096 if kind == "short" else size, writable=kind == "writable")
    mapping.close()
    return [fd, os.dup(fd), os.dup(fd)] if kind == "too many" else [fd]
