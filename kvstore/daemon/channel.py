"""A client's first socket: a request, then its answer, each within a deadline. Any thread; one call at a time.

An answer that comes too late is not lost on the daemon: it may have taken a lease for it. So whoever gave up leaves a
note, and the next who reads past the answer sees to it.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from kvstore.daemon.link import MAX_FDS
from kvstore.daemon.pipe import Pipe
from kvstore.daemon.wire import (
    HEADER,
    MAX_ANSWER,
    MAX_BODY,
    MAX_NUMBER,
    VERSION,
    BadFrame,
    Head,
    Kind,
    head_of,
    pack,
    unpack,
)
from kvstore.errors import BadInput, KVStoreError, Unreachable, Unsupported

TELLING = 1.0  # seconds that a message without an answer may take to be sent
Arrived = Callable[[list[list[Any]], list[int]], None]


def close_all(fds: Sequence[int]) -> None:
    """Closes descriptors."""
    for fd in fds:
        os.close(fd)


class Frames:
    """Frames from a blocking socket. One thread at a time."""

    def __init__(self, sock: Pipe) -> None:
        self._socket = sock
        self._head: Head | None = None
        self._buffer, self._filled = bytearray(HEADER.size), 0
        self._fds: list[int] = []

    def read(self, deadline: float) -> tuple[Kind, int, Any, list[int]]:
        """The next frame, and descriptors that came with it; of one that is late, the rest comes in the next call.

        Raises ``TimeoutError``, ``BadFrame``, ``OSError``."""
        while True:
            self._fill(deadline)
            if self._head is None:
                self._head = head_of(self._buffer, MAX_ANSWER)
                self._buffer, self._filled = bytearray(self._head.length), 0
                continue
            head, body = self._head, self._buffer
            self._head, self._buffer, self._filled = None, bytearray(HEADER.size), 0
            value = unpack(head, body)
            fds, self._fds = self._fds, []
            return head.kind, head.number, value, fds

    def _fill(self, deadline: float) -> None:
        view = memoryview(self._buffer)
        while self._filled < len(view):
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._socket.settimeout(left)
            space = socket.CMSG_SPACE(MAX_FDS * 4) if self._head is None else 0
            got, control, _, _ = self._socket.recvmsg_into([view[self._filled :]], space, socket.MSG_CMSG_CLOEXEC)
            for level, kind, data in control:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    fds = array.array("i")
                    fds.frombytes(data[: len(data) - len(data) % 4])
                    self._fds += fds
            if not got:
                raise ConnectionResetError("it has closed the connection")
            self._filled += got

    def close(self) -> None:
        """Closes descriptors that nobody has taken."""
        close_all(self._fds)
        self._fds = []


class Channel:
    """Requests and answers over a connected socket."""

    def __init__(self, sock: Pipe, arrived: Arrived, late: Callable[[str, Any], None]) -> None:
        """``arrived`` takes arenas and their descriptors; ``late`` a verb and its answer that nobody waits for."""
        self._socket, self._frames = sock, Frames(sock)
        self._arrived, self._late = arrived, late
        self._lock = threading.Lock()  # guards all; held for a call
        self._number = 0
        self._left: dict[int, str] = {}  # requests whose caller has given up, and what they asked
        self._fds: list[int] = []
        self.limit = MAX_BODY  # bytes that the daemon takes in one message
        self.broken = False

    def hello(self, token: str | None, deadline: float, wanted: int) -> tuple[list[Any], list[int]]:
        """The first call: what the daemon says of itself, and so many descriptors. Raises ``Unreachable``."""
        with self._lock:
            try:
                self._send("hello", (VERSION, token), deadline)
                kind, _, value, fds = self._frames.read(deadline)
            except (OSError, BadFrame) as error:
                raise Unreachable(f"the daemon does not answer: {error}") from error
        if kind != Kind.ANSWER or len(fds) != wanted:
            close_all(fds)
            raise Unreachable("the daemon does not take this process for one of its clients; its log says why")
        return value, fds

    def call(self, verb: str, *arguments: object, deadline: float) -> tuple[int, Any]:
        """The request's number, and the answer. Raises what the daemon raises, or ``Unreachable``."""
        with self._speaking(deadline):
            number = self._send(verb, arguments, deadline)
            try:
                return number, self._answer(number, deadline)
            except TimeoutError:
                self._left[number] = verb
                raise Unreachable(f"the daemon did not answer {verb!r} in time") from None

    def tell(self, verb: str, *arguments: object, patience: float = TELLING) -> None:
        """``call`` of what nobody needs an answer to; what is called next comes behind it. Raises ``Unreachable``."""
        deadline = time.monotonic() + patience
        with self._speaking(deadline):
            self._left[self._send(verb, arguments, deadline)] = verb

    @contextlib.contextmanager
    def _speaking(self, deadline: float) -> Iterator[None]:
        """Holds the lock. Raises ``Unreachable``; what breaks off in the middle is broken for good."""
        if not self._lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise Unreachable("other calls kept this one waiting too long")
        try:
            if self.broken:
                raise Unreachable("the connection is broken")
            yield
        except (OSError, BadFrame) as error:
            self.broken = True
            raise Unreachable(f"the daemon is gone: {error}") from error
        finally:
            self._lock.release()

    def _send(self, verb: str, arguments: tuple[object, ...], deadline: float) -> int:
        self._number = self._number % MAX_NUMBER + 1
        try:
            data = pack(Kind.REQUEST, self._number, [verb, *arguments])
        except BadFrame as error:
            raise BadInput(str(error)) from error
        if len(data) > self.limit:
            raise BadInput(f"this takes a message of {len(data)} bytes, and the daemon takes {self.limit}: max_frame")
        self._socket.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            self._socket.sendall(data)
        except TimeoutError as error:  # half of it may have gone
            raise ConnectionAbortedError("it does not read what it is sent") from error
        return self._number

    def _answer(self, number: int, deadline: float) -> Any:
        while True:
            kind, answered, value, fds = self._frames.read(deadline)
            self._fds += fds
            if kind == Kind.EVENT:
                continue  # descriptors that did not fit beside the answer
            fds, self._fds = self._fds, []
            if kind == Kind.ANSWER:
                value, arenas = value
                self._arrived(arenas, fds)
            if answered == number:
                if kind == Kind.ERROR:
                    raise error_from(*value)
                return value
            verb = self._left.pop(answered, "")
            if verb and kind == Kind.ANSWER:
                self._late(verb, value)

    def close(self) -> None:
        """Ends the connection; calls under way fail."""
        self.broken = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        with self._lock:
            self._socket.close()
            self._frames.close()
            close_all(self._fds)
            self._fds = []


def error_from(kind: str, text: str) -> KVStoreError:
    """What the daemon raised, if the caller can mend it; a daemon that fails is one that cannot be reached."""
    raised = {"BadInput": BadInput, "Unsupported": Unsupported}.get(kind)
    return Unreachable(f"the daemon could not do it: {text}") if raised is None else raised(text)


def connected(path: Path, deadline: float) -> socket.socket:
    """A socket that is connected to a daemon. Raises ``Unreachable``."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    folder = -1
    try:
        sock.settimeout(max(0.001, deadline - time.monotonic()))
        place = os.fsencode(path)
        if len(place) > 100:  # longer than an address can be: by way of its folder
            folder = os.open(path.parent, os.O_PATH | os.O_CLOEXEC)
            place = f"/proc/self/fd/{folder}/{path.name}".encode()
        sock.connect(place)
    except OSError as error:
        sock.close()
        text = error.strerror or "no answer"
        raise Unreachable(f"no daemon listens at {path} ({text}); start one with kvstore serve") from error
    finally:
        if folder >= 0:
            os.close(folder)
    return sock
