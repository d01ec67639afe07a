"""A TCP proxy that treats what a server answers in the ways of bad networks; the way can be changed at any time."""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

CHUNK = 1 << 18
GARBAGE = 10 << 20  # bytes
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends a reset
MODES = ("as it is", "50 ms", "500 ms", "1 byte/s", "black hole", "reset", "half-open", "wrong bytes", "garbage")


class Proxy:
    """Passes connections on to a port of loopback. ``mode`` is one of ``MODES``.

    "black hole": whatever comes is taken, nothing is passed on. "half-open": what is connected stays so and is silent,
    and who connects anew gets no further than the system's queue. "wrong bytes": one bit in some thousand is turned in
    what the server answers. "garbage": it answers anything with 10 MB that nobody asked for.
    """

    def __init__(self, port: int) -> None:
        self.mode = "as it is"
        garbage()
        self.passed = 0  # bytes that the server has answered
        self.connections = 0
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(0.05)
        self.port: int = self._listener.getsockname()[1]
        self._over = threading.Event()
        self._lock = threading.Lock()  # guards the fields below
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def close(self) -> None:
        """Ends all connections and threads."""
        self._over.set()
        self.cut()
        while True:
            with self._lock:
                left = [thread for thread in self._threads if thread.is_alive()]
            if not left:
                break
            left[0].join(5.0)
            self.cut()
        self._listener.close()

    def cut(self) -> None:
        """Ends all connections that there are."""
        with self._lock:
            sockets, self._sockets = self._sockets, []
        for each in sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _start(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, daemon=True)
        with self._lock:
            self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._over.wait(0.05 if self.mode == "half-open" else 0):
            if self.mode == "half-open":
                continue
            try:
                client, _ = self._listener.accept()
            except OSError:
                continue
            self.connections += 1
            try:
                server = socket.create_connection(("127.0.0.1", self._target), 5.0)
            except OSError:
                client.close()
                continue
            for each in (client, server):
                each.settimeout(None)
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._sockets += [client, server]
            answers: queue.Queue[tuple[float, bytes]] = queue.Queue()
            self._start(lambda c=client, s=server: self._ask(c, s))  # type: ignore[misc]
            self._start(lambda s=server, a=answers: self._listen(s, a))  # type: ignore[misc]
            self._start(lambda c=client, a=answers: self._answer(c, a))  # type: ignore[misc]

    def _ask(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(CHUNK):
                if self.mode == "reset":
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                    client.close()
                elif self.mode == "garbage":
                    client.sendall(garbage())
                elif self.mode not in ("black hole", "half-open"):
                    server.sendall(data)
            server.shutdown(socket.SHUT_WR)

    def _listen(self, server: socket.socket, answers: queue.Queue[tuple[float, bytes]]) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(CHUNK):
                delay = {"50 ms": 0.05, "500 ms": 0.5}.get(self.mode, 0.0)
                answers.put((time.monotonic() + delay, data))
        answers.put((0.0, b""))

    def _answer(self, client: socket.socket, answers: queue.Queue[tuple[float, bytes]]) -> None:
        with contextlib.suppress(OSError):
            while True:
                due, data = answers.get()
                if not data or self._over.wait(max(due - time.monotonic(), 0)):
                    break
                self.passed += len(data)
                if self.mode == "wrong bytes":
                    data = damaged(data)
                if self.mode == "1 byte/s":
                    for byte in data:
                        client.sendall(bytes([byte]))
                        if self._over.wait(1.0) or self.mode != "1 byte/s":
                            break
                elif self.mode not in ("black hole", "half-open"):
                    client.sendall(data)
            client.shutdown(socket.SHUT_RDWR)


@cache
def garbage() -> bytes:
    """Made once, or making it would be what is measured."""
    return os.urandom(GARBAGE)


def damaged(data: bytes) -> bytes:
    """With a bit turned in every few hundred bytes, the last one among them."""
    changed = bytearray(data)
    for at in {*range(300, len(data), 700), len(data) - 3 if len(data) > 60 else 0}:
        changed[at] ^= 0x10
    return bytes(changed)


@contextmanager
def between(port: int) -> Iterator[Proxy]:
    """A proxy in front of a port, ended afterwards."""
    proxy = Proxy(port)
    try:
        yield proxy
    finally:
        proxy.close()


class Apart:
    """A proxy in a process of its own, which takes no time from who is measured. Has ``mode``, ``url`` and ``cut``."""

    def __init__(self, port: int) -> None:
        command = [sys.executable, "-m", "kvstore.bench.remote.proxy", str(port)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._mode = MODES[0]
        self.port = int(self._ask(""))

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def mode(self) -> str:
        """As of ``Proxy``."""
        return self._mode

    @mode.setter
    def mode(self, mode: str) -> None:
        self._ask(f"mode {mode}")
        self._mode = mode

    @property
    def passed(self) -> int:
        """As of ``Proxy``."""
        return int(self._ask("passed"))

    def cut(self) -> None:
        """As of ``Proxy``."""
        self._ask("cut")

    def close(self) -> None:
        """Ends the process."""
        with self._process:
            pass  # its input ends, and so does it

    def _ask(self, words: str) -> str:
        assert self._process.stdin is not None and self._process.stdout is not None
        if words:
            self._process.stdin.write(words + "\n")
            self._process.stdin.flush()
        return self._process.stdout.readline()


def main() -> None:
    """What the process of an ``Apart`` does: one line of its input at a time, and an answer to each."""
    with between(int(sys.argv[1])) as proxy:
        print(proxy.port, flush=True)
        for line in sys.stdin:
            word, _, rest = line.strip().partition(" ")
            if word == "mode":
                proxy.mode = rest
            elif word == "cut":
                proxy.cut()
            print(proxy.passed, flush=True)


if __name__ == "__main__":
    main()
