"""Clients that are none: raw sockets that say to a daemon what they like."""

from __future__ import annotations

import array
import contextlib
import os
import socket
from pathlib import Path
from typing import Any

import msgpack
from daemons import PATIENCE
from mutations import Frames, framed

from kvstore.daemon.wire import HEADER, MAX_ANSWER, VERSION, Kind, head_of, unpack

PIPELINE = 16  # frames on their way


class Peer:
    """One connection. ``events``: its second socket, once it has said hello."""

    def __init__(self, path: Path, token: str | None = None, greet: bool = True) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(str(path))
        self.events: socket.socket | None = None
        self.fds: list[int] = []
        if greet:
            self.send(framed(["hello", VERSION, token]))
            _, _, said = self.read()
            assert isinstance(said, list) and len(said) == 5, said
            self.events = socket.socket(fileno=self.fds[0])
            self.events.settimeout(PATIENCE)
            os.close(self.fds[1])
            self.fds = []

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.sock.close()
        if self.events is not None:
            self.events.close()
        for fd in self.fds:
            os.close(fd)
        self.fds = []

    def send(self, data: bytes) -> bool:
        """False: the daemon has closed the connection."""
        try:
            self.sock.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True

    def read(self) -> tuple[Kind, int, Any]:
        """The next frame: kind, number, value; descriptors go to ``fds``. Raises ``EOFError``."""
        return self._read(self.sock)

    def event(self) -> Any:
        """What the next event says."""
        assert self.events is not None
        return self._read(self.events)[2]

    def _read(self, sock: socket.socket) -> tuple[Kind, int, Any]:
        head = head_of(self._exactly(sock, HEADER.size), MAX_ANSWER)
        return head.kind, head.number, unpack(head, self._exactly(sock, head.length))

    def ask(self, verb: str, *arguments: object, number: int = 1) -> Any:
        """The value that a request is answered with; errors as a list of strings. Raises ``EOFError``."""
        if not self.send(framed([verb, *arguments], number)):
            raise EOFError
        while True:
            kind, answered, value = self.read()
            if answered == number and kind != Kind.EVENT:
                return value

    def answered(self) -> bool:
        """Reads up to the next answer; False: there will be none."""
        try:
            while self.read()[0] == Kind.EVENT:
                pass
        except EOFError:
            return False
        for fd in self.fds:
            os.close(fd)
        self.fds = []
        return True

    def listen(self) -> None:
        """From now on the second socket is not waited for."""
        assert self.events is not None
        self.events.setblocking(False)

    def tell(self, data: bytes) -> bool:
        """Sends an event, and drops those that came; False: the daemon has closed the connection."""
        assert self.events is not None
        with contextlib.suppress(BlockingIOError):
            while self.events.recv(1 << 20):
                pass
            return False
        try:
            self.events.send(data)
        except BlockingIOError:
            pass
        except OSError:
            return False
        return True

    def over(self) -> bool:
        """Says that nothing more will come, and waits until the daemon has closed; what it says first is dropped."""
        try:
            self.sock.shutdown(socket.SHUT_WR)
            while self.sock.recv(1 << 20):
                pass
        except (ConnectionResetError, BrokenPipeError, OSError) as error:
            return not isinstance(error, TimeoutError)
        return True

    def _exactly(self, sock: socket.socket, size: int) -> bytes:
        found = bytearray()
        while len(found) < size:
            try:
                data, control, _, _ = sock.recvmsg(size - len(found), socket.CMSG_SPACE(1000))
            except ConnectionResetError:
                raise EOFError from None
            if not data:
                raise EOFError
            found += data
            for _, _, rights in control:
                fds = array.array("i")
                fds.frombytes(rights)
                self.fds += fds
        return bytes(found)


def poured(path: Path, token: str | None, frames: Frames, count: int) -> int:
    """Sends so many frames, each to a session that is alive, and hears all answers; how many sessions it took."""
    sessions, sent = 0, 0
    waiting = list[bytes]()
    while sent < count:
        sessions += 1
        with Peer(path, token) as peer:
            peer.listen()
            alive = True
            while alive and sent < count:
                broken = b""
                while len(waiting) < PIPELINE and not broken:
                    frame, whole = frames.next()
                    if whole:
                        waiting.append(frame)
                    else:
                        broken = frame
                peer.send(b"".join(waiting))
                while waiting and alive:
                    alive = peer.answered()
                    del waiting[0]  # it was answered, or it was the last that the session heard
                    sent += 1
                if broken and alive:
                    peer.send(broken)
                    assert peer.over(), "half a frame is no end"
                    alive, sent = False, sent + 1
                if alive and not peer.tell(frames.event()):
                    alive = False
    return sessions


def bombs() -> list[tuple[str, bytes]]:
    """Bodies that say little and would take much, or look like what other programs run."""
    empty, many = b"\x90", 400_000
    return [
        ("many empty lists", b"\xdd" + many.to_bytes(4, "big") + empty * many),
        ("many empty maps", b"\xdd" + many.to_bytes(4, "big") + b"\x80" * many),
        ("lists in lists", b"\x91" * 500_000 + b"\xc0"),
        ("lists that promise much", (b"\xdd" + (300_000).to_bytes(4, "big")) * 1000 + b"\xc0" * 300_000),
        ("a list longer than it is", b"\xdd\xff\xff\xff\xff"),
        ("a map longer than it is", b"\xdf\xff\xff\xff\xff"),
        ("text longer than it is", b"\xdb\xff\xff\xff\xff"),
        ("a map with lists for keys", b"\x81\x90\xc0"),
        ("one key many times", b"\xdf" + many.to_bytes(4, "big") + b"\x01\xc0" * many),
        ("nothing", b""),
        ("two values", msgpack.packb(["ping"]) * 2),
    ]
