"""Sockets that listen on a loop."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import Any

log = logging.getLogger("kvstore")

PAUSE = 0.5  # seconds until connections are looked for again when one could not be taken


class Ears:
    """Takes connections, one after the other. Belongs to the loop of the thread that made it.

    When there are no descriptors left, those who come wait: to look for them all the while would help nobody."""

    def __init__(self, taken: Callable[[socket.socket, Any], None]) -> None:
        """``taken`` gets each connection, and where it comes from."""
        self._loop, self._taken = asyncio.get_running_loop(), taken
        self._sockets: list[socket.socket] = []

    def listen(self, sock: socket.socket) -> None:
        """Takes connections of a listening socket, which is closed in the end."""
        sock.setblocking(False)
        self._sockets.append(sock)
        self._look(sock)

    def close(self) -> None:
        """Takes no more; again is no error."""
        for sock in self._sockets:
            self._loop.remove_reader(sock.fileno())
            sock.close()
        self._sockets.clear()

    def _look(self, sock: socket.socket) -> None:
        if sock.fileno() >= 0:
            self._loop.add_reader(sock.fileno(), self._accept, sock)

    def _accept(self, sock: socket.socket) -> None:
        try:
            came, address = sock.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            log.warning("a connection could not be taken: %s; the next is looked for in %g s", error, PAUSE)
            self._loop.remove_reader(sock.fileno())
            self._loop.call_later(PAUSE, self._look, sock)
            return
        self._taken(came, address)
