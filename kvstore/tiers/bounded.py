"""A bound on everything that a thread does with sockets: until when, and how many bytes may come.

Clients of network services bound each receive, so a peer that sends a byte a second holds them as long as it likes.
Here each step gets only the time that is left of the whole.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class _Bounds(threading.local):
    until: float | None = None  # time.monotonic
    bytes: int = 0


_bounds = _Bounds()


@contextmanager
def bounded(seconds: float, size: int) -> Iterator[None]:
    """Whatever this thread does with bounded sockets inside is over after ``seconds``, and receives at most ``size``
    bytes; what would take more raises ``TimeoutError`` or ``OSError``."""
    before = _bounds.until, _bounds.bytes
    _bounds.until, _bounds.bytes = time.monotonic() + seconds, size
    try:
        yield
    finally:
        _bounds.until, _bounds.bytes = before


def time_left() -> float | None:
    """Seconds that this thread has; None: as many as it likes. Raises ``TimeoutError`` when there are none."""
    if _bounds.until is None:
        return None
    left = _bounds.until - time.monotonic()
    if left <= 0:
        raise TimeoutError("the time for this call is over")
    return left


class BoundedSocket:
    """A connected socket, plain or TLS, that keeps to the bounds of the thread that uses it."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._asked = sock.gettimeout()

    def settimeout(self, seconds: float | None) -> None:
        """What the client asks for besides; the shorter time counts."""
        self._asked = seconds

    def gettimeout(self) -> float | None:
        """What the client asked for."""
        return self._asked

    def recv(self, size: int, flags: int = 0) -> bytes:
        """As a socket's."""
        self._ready()
        data = self._sock.recv(size, flags)
        if not flags:
            self._came(len(data))
        return data

    def recv_into(self, buffer: Any, size: int = 0, flags: int = 0) -> int:
        """As a socket's."""
        self._ready()
        count = self._sock.recv_into(buffer, size, flags)
        self._came(count)
        return count

    def sendall(self, data: Any) -> None:
        """As a socket's, but the time is for all of it, with TLS too."""
        view = memoryview(data).cast("B")
        while view:
            self._ready()
            view = view[self._sock.send(view) :]

    def _ready(self) -> None:
        left = time_left()
        both = [seconds for seconds in (left, self._asked) if seconds is not None]
        self._sock.settimeout(min(both, default=None))

    def _came(self, count: int) -> None:
        if _bounds.until is None:
            return
        _bounds.bytes -= count
        if _bounds.bytes < 0:
            raise OSError("the peer sends more than was asked for")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)
