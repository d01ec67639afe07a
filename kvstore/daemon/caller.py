"""How a client reaches its daemon: one session at a time, made anew when it is needed and the last one is over."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from kvstore.daemon.connection import Connection
from kvstore.errors import ForkError, StoreClosed, Unreachable

log = logging.getLogger("kvstore")

T = TypeVar("T")
AGAIN = 0.1  # seconds after which a daemon that was not there is looked for again, at least


class Caller:
    """One client's way to one daemon. Any thread."""

    def __init__(self, place: str, timeout: float, connect: Callable[[float], Connection]) -> None:
        """``connect`` makes a session within a deadline. Raises ``Unreachable`` when no daemon is there."""
        self._place, self._timeout, self._connect, self._pid = place, timeout, connect, os.getpid()
        self._lock = threading.Lock()  # guards the fields below
        self._closed = False
        self._again = 0.0  # when a daemon that was not there is looked for again
        self._connection: Connection | None = connect(self.deadline())

    def deadline(self) -> float:
        """When a call that begins now must be over (``time.monotonic``)."""
        return time.monotonic() + self._timeout

    def check(self) -> None:
        """Raises ``ForkError`` or ``StoreClosed``."""
        if os.getpid() != self._pid:
            raise ForkError("this client was connected before a fork; call kvstore.connect in the child")
        if self._closed:
            raise StoreClosed("the client is closed; connect again with kvstore.connect")

    def connected(self, deadline: float) -> Connection:
        """The session, or a new one. Raises ``Unreachable``."""
        self.check()
        connection = self._connection
        if connection is not None and connection.usable:
            return connection
        if not self._lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise Unreachable(f"a daemon at {self._place} is looked for, and does not answer yet")
        try:
            self.check()
            connection, now = self._connection, time.monotonic()
            if connection is not None and connection.usable:
                return connection
            if connection is not None:
                self._connection = None
                connection.close()
            if now < self._again:
                raise Unreachable(f"no daemon listens at {self._place}; start one with kvstore serve")
            try:
                self._connection = self._connect(deadline)
            except Unreachable:
                failed = time.monotonic()
                self._again = failed + max(AGAIN, failed - now)  # one that is silent costs half of the time at most
                raise
            return self._connection
        finally:
            self._lock.release()

    def call(self, verb: str, *arguments: object) -> Any:
        """The answer. Raises what the daemon raises, or ``Unreachable``."""
        return self.asked(verb, *arguments)[1]

    def asked(self, verb: str, *arguments: object) -> tuple[Connection, Any]:
        """The session, and its answer. Raises what the daemon raises, or ``Unreachable``."""
        deadline = self.deadline()
        connection = self.connected(deadline)
        return connection, connection.channel.call(verb, *arguments, deadline=deadline)[1]

    def long(self, verb: str, *arguments: object, patience: float) -> Any:
        """``call`` for what may take its time: the answer is an event."""
        deadline = self.deadline()
        connection = self.connected(deadline)
        number, _ = connection.channel.call(verb, *arguments, deadline=deadline)
        return connection.ticket(number).wait(patience + self._timeout)

    def instead(self, value: T, call: Callable[[], T]) -> T:
        """What ``call`` gives, or ``value`` when the daemon cannot be reached."""
        try:
            return call()
        except Unreachable as error:
            log.debug("%s", error)
            return value

    def close(self) -> bool:
        """Ends the session; False when there is nothing to end."""
        if os.getpid() != self._pid:
            return False
        with self._lock:
            if self._closed:
                return False
            self._closed = True
            connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
        return True
