"""What callers cost who send nothing, too much, or read nothing; and a daemon that is stuck."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from watched import PATIENCE, Watched, connected, exchange, get, watched

from kvstore.daemon import http, listener
from kvstore.daemon.http import Monitor
from kvstore.daemon.listener import Listener, Reply, Request

ASK = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture
def both(tmp_path: Path) -> Iterator[tuple[Watched, Monitor]]:
    with watched(tmp_path) as pair:
        yield pair


def ended(connection: socket.socket) -> bool:
    """Waits until the other side ends it, without a word."""
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True


@pytest.mark.parametrize("which", ["http", "health"])
def test_idle_callers_make_room_for_those_who_ask(both: Any, which: str) -> None:
    _, monitor = both
    threads = threading.active_count()
    idle = [connected(monitor, which) for _ in range(500)]
    try:
        assert get(monitor, "/livez", which)[0] == 200
        assert get(monitor, "/readyz", which)[0] == 200
        assert threading.active_count() <= threads + http.WORKERS
        assert all(ended(connection) for connection in idle[: 500 - listener.CONNECTIONS])
        idle[-1].sendall(ASK)  # the latest are still heard
        assert idle[-1].recv(65536).startswith(b"HTTP/1.1 200 ")
    finally:
        for connection in idle:
            connection.close()


def test_a_head_without_an_end_is_cut_off(both: Any) -> None:
    _, monitor = both
    assert exchange(monitor, b"GET /livez HTTP/1.1\r\nX: " + b"x" * (listener.HEAD_BYTES - 100) + b"\r\n\r\n") != b""
    sent = 0
    with connected(monitor) as connection:
        try:
            connection.sendall(b"GET /livez HTTP/1.1\r\nX: ")
            while sent < 64 << 20:
                sent += connection.send(b"x" * 65536)
        except ConnectionError:
            pass
    assert sent < 16 << 20  # what the system buffers on the way
    assert exchange(monitor, ASK).startswith(b"HTTP/1.1 200 ")


def test_many_short_headers_are_too_many(both: Any) -> None:
    for count, served in ((listener.HEAD_BYTES // 6, False), (listener.HEAD_BYTES // 12, True)):
        answer = exchange(both[1], ASK[:-2] + b"X: y\r\n" * count + b"\r\n")
        assert answer.startswith(b"HTTP/1.1 200 ") is served


def test_a_caller_who_speaks_too_slowly_is_cut_off(both: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, monitor = both
    with connected(monitor) as patient:
        patient.sendall(ASK[:-2])
        assert get(monitor, "/livez")[0] == 200  # by now the other one's time runs, too
        monkeypatch.setattr(listener, "HEAD_SECONDS", 0.1)
        with connected(monitor) as slow:
            slow.sendall(ASK[:-2])
            assert ended(slow)
        patient.sendall(ASK[-2:])  # it had more time
        assert patient.recv(65536).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("reads", [False, True])
def test_a_caller_who_does_not_read_is_cut_off(reads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 32 << 20  # more than the system buffers

    async def answer(request: Request) -> Reply:
        return Reply(200, bytes(size))

    def call(port: int) -> int:
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
            connection.sendall(ASK)
            received = 0
            if not reads:
                assert gone.wait(PATIENCE)
            try:
                while piece := connection.recv(1 << 20):
                    received += len(piece)
            except ConnectionError:
                pass
            return received

    async def serve() -> int:
        server = Listener(answer)
        _, port = await server.open("127.0.0.1", 0)
        caller = asyncio.get_running_loop().run_in_executor(None, call, port)
        while not server._tasks:
            await asyncio.sleep(0)
        await asyncio.wait(server._tasks)
        gone.set()
        received = await caller
        await server.close()
        return received

    gone = threading.Event()
    if not reads:
        monkeypatch.setattr(listener, "SEND_SECONDS", 0.1)
    received = asyncio.run(serve())
    assert received > size if reads else received < size


def test_a_daemon_that_is_stuck_is_alive_and_not_ready(both: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    held, monitor = both
    monkeypatch.setattr(http, "ANSWER_SECONDS", 0.05)
    go_on = threading.Event()
    monkeypatch.setattr(held, "ready", lambda: "" if go_on.wait(PATIENCE) else "stuck")
    try:
        for _ in range(http.QUEUED + 4):
            assert get(monitor, "/readyz", "health")[0] == 503
            assert get(monitor, "/livez", "health")[0] == 200
    finally:
        go_on.set()
    while get(monitor, "/readyz", "health")[0] != 200:  # once those are through that nobody waits for any more
        pass
    assert get(monitor, "/healthz")[0] == 200


def test_the_end_ends_all_connections(tmp_path: Path) -> None:
    with watched(tmp_path) as (_, monitor):
        idle = [connected(monitor, which) for which in ("http", "health") for _ in range(10)]
        assert get(monitor, "/livez")[0] == 200
        addresses = dict(monitor.addresses)
    for connection in idle:
        with connection:
            assert ended(connection)
    for place in addresses.values():
        with pytest.raises(ConnectionError):
            socket.create_connection(place, timeout=PATIENCE)
