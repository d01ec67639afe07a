"""A daemon's stores without the daemon, watched over HTTP; and requests, well made or not."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blocks import found, ids, save

import kvstore
from kvstore.daemon.failures import Failures
from kvstore.daemon.http import Monitor
from kvstore.daemon.watched import SessionInfo
from kvstore.local import LocalStore
from kvstore.settings.address import Address

NAME = "team-a"
PATIENCE = 20.0  # seconds until a test that hangs says so


class Watched:
    """Two tenants' stores, a session each, and what was logged."""

    def __init__(self, stores: Mapping[str, LocalStore], failures: Failures) -> None:
        self.stores = stores
        self.why = ""
        self._failures, self._since = failures, time.time()

    def sessions(self) -> list[SessionInfo]:
        """One for each tenant."""
        return [
            SessionInfo(7 + at, tenant, 1000 + at, 4000 + at, self._since, 3 * at, at, 1 << 20)
            for at, tenant in enumerate(self.stores)
        ]

    def refused(self) -> int:
        """Some."""
        return 3

    def uptime(self) -> float:
        """Seconds."""
        return time.time() - self._since

    def ready(self) -> str:
        """As a test says."""
        return self.why

    def failures(self) -> list[tuple[float, str]]:
        """What was logged."""
        return self._failures.recent()


@contextmanager
def watched(folder: Path, every: float = 2.0) -> Iterator[tuple[Watched, Monitor]]:
    """Stores with something in them, that were used, and their monitor at any two ports."""
    failures = Failures()
    failures.attach()
    with (
        kvstore.open(folder / "main", host="2MiB", disk="8MiB") as main,
        kvstore.open(folder / NAME, host="4MiB", disk="4MiB") as other,
    ):
        for place, store in enumerate((main, other)):
            for turn in range(6):
                save(store, ids(10 * place + turn, 40 + turn), owner=f"owner-{place}").wait()
                traffic(store, ids(10 * place + turn, 40 + turn))
        held = Watched({"": main, NAME: other}, failures)
        monitor = Monitor(held, Address("127.0.0.1", 0), Address("127.0.0.1", 0), kvstore.__version__, every)
        monitor.start()
        try:
            yield held, monitor
        finally:
            monitor.close()
            failures.close()


def traffic(store: LocalStore, tokens: list[int]) -> None:
    """A prompt that is found, for the most part."""
    found(store, [*tokens, *ids(99, 8)]).release()


def get(
    monitor: Monitor, path: str, which: str = "http", method: str = "GET", headers: Mapping[str, str] | None = None
) -> tuple[int, Mapping[str, str], bytes]:
    """Status, headers by lower-case name, and body."""
    host, port = monitor.addresses[which]
    connection = http.client.HTTPConnection(host, port, timeout=PATIENCE)
    try:
        connection.request(method, path, headers=dict(headers or {}))
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def told(monitor: Monitor, path: str) -> Any:
    """What an address of the API says."""
    status, _, body = get(monitor, path)
    assert status == 200, body
    return json.loads(body)


def connected(monitor: Monitor, which: str = "http") -> socket.socket:
    """A connection on which nothing is said yet."""
    return socket.create_connection(monitor.addresses[which], timeout=PATIENCE)


def exchange(monitor: Monitor, sent: bytes, which: str = "http") -> bytes:
    """All that comes back for these bytes; nothing, when the connection is cut."""
    with connected(monitor, which) as connection:
        received = b""
        try:
            connection.sendall(sent)
            while piece := connection.recv(65536):
                received += piece
        except ConnectionError:
            pass
        return received
