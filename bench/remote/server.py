"""A redis-server of one's own, on a port of loopback that nobody else has; it keeps nothing on disk."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis

from kvstore.errors import BadInput

PATIENCE = 20.0  # seconds until a server is there


def program() -> str:
    """Where redis-server is. Raises ``BadInput``."""
    found = shutil.which("redis-server")
    if found is None:
        raise BadInput("redis-server is not installed; install the package redis-server")
    return found


def free_port() -> int:
    """A port of loopback that is free now, and so is the one 10,000 above it."""
    while True:
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            port: int = one.getsockname()[1]
        with socket.socket() as other:
            if port < 50000 and other.connect_ex(("127.0.0.1", port + 10000)):
                return port


@dataclass
class Server:
    """One redis-server under way."""

    port: int
    folder: Path
    process: subprocess.Popen[bytes]
    options: dict[str, Any] = field(default_factory=dict)  # how tests talk to it beside the store

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def client(self) -> redis.Redis:
        """A client of the test's own; the caller closes it."""
        return redis.Redis(host="127.0.0.1", port=self.port, **self.options)

    def names(self) -> list[bytes]:
        with self.client() as client:
            return sorted(client.keys())

    def kill(self) -> None:
        """As a power cut would."""
        self.process.kill()
        self.process.wait(PATIENCE)


def start(folder: Path, *arguments: str, port: int | None = None, **options: Any) -> Server:
    """Starts a server that keeps nothing on disk, and waits until it answers."""
    port = free_port() if port is None else port
    folder.mkdir(parents=True, exist_ok=True)
    listening = () if "--port" in arguments else ("--port", str(port))
    command = [program(), *listening, "--bind", "127.0.0.1", "--dir", str(folder), "--save", "", "--appendonly", "no"]
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen([*command, *arguments], stdout=log, stderr=log)
    server = Server(port, folder, process, options)
    try:
        wait_until(lambda: process.poll() is not None or answers(server), "redis-server does not answer")
        assert process.poll() is None, (folder / "log").read_text()[-500:]
    except BaseException:
        server.kill()
        raise
    return server


def answers(server: Server) -> bool:
    with server.client() as client:
        try:
            return bool(client.ping())
        except redis.RedisError:
            return False


def wait_until(true: Callable[[], object], what: str = "it does not happen") -> None:
    """Until a condition of the world outside holds."""
    deadline, pause = time.monotonic() + PATIENCE, threading.Event()
    while not true():
        assert time.monotonic() < deadline, what
        pause.wait(0.01)


@contextmanager
def running(*arguments: str, port: int | None = None, **options: Any) -> Iterator[Server]:
    """A server, ended afterwards."""
    with tempfile.TemporaryDirectory(prefix="kvstore-redis-") as folder:
        server = start(Path(folder), *arguments, port=port, **options)
        try:
            yield server
        finally:
            server.kill()
