"""Real daemons for tests: each in a process of its own, ended by its id when the test is over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import kvstore
from kvstore.daemon.client import Client

PATIENCE = 20.0  # seconds until a test that hangs says so
TIMEOUT = 10.0  # of calls in tests, on a machine that does other things too


@dataclass
class Daemon:
    """One ``kvstore serve`` under way. ``socket``: where it listens."""

    process: subprocess.Popen[bytes]
    socket: Path
    log: Path

    @property
    def url(self) -> str:
        return f"unix:{self.socket}"

    @property
    def pid(self) -> int:
        return self.process.pid

    def connect(self, timeout: float = TIMEOUT) -> Client:
        """A client; the caller closes it."""
        return kvstore.connect(self.url, timeout=timeout)

    def kill(self, number: int = signal.SIGKILL) -> int:
        """Sends a signal that ends it, and waits for that; its exit code, or minus the signal."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)


def start(folder: Path, *flags: object, environ: Mapping[str, str] | None = None) -> Daemon:
    """Starts ``kvstore serve`` with these flags, and waits until it serves. Unless they name a socket it listens at
    ``folder/kvstore.sock``; give ``"--dir", folder`` for a disk tier."""
    words = [*map(str, flags)]
    socket = folder / "kvstore.sock"
    if "--socket" in words:
        socket = Path(words[words.index("--socket") + 1])
    elif "--dir" in words:
        socket = Path(words[words.index("--dir") + 1]) / "kvstore.sock"
    else:
        words += ["--socket", str(socket)]
    if "--host" not in words:
        words += ["--host", "64MiB"]
    number, name = tempfile.mkstemp(prefix="daemon-", suffix=".log", dir=folder)
    with os.fdopen(number, "wb") as log:
        command = [sys.executable, "-m", "kvstore.cli", "serve", *words]
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **(environ or {})})
    daemon = Daemon(process, socket, Path(name))

    def serves() -> bool:
        assert process.poll() is None, daemon.log.read_text()[-2000:]
        try:
            daemon.connect().close()
        except kvstore.Unreachable:
            return False
        return True

    try:
        until(serves, "the daemon does not serve")
    except BaseException:
        process.kill()
        process.wait(PATIENCE)
        raise
    return daemon


@contextmanager
def daemon(folder: Path, *flags: object, environ: Mapping[str, str] | None = None) -> Iterator[Daemon]:
    """A daemon, stopped afterwards; see ``start``."""
    started = start(folder, *flags, environ=environ)
    try:
        yield started
    finally:
        if started.process.poll() is None:
            started.process.terminate()
            try:
                started.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                started.kill()
                raise


def until(true: Callable[[], bool], what: str = "it does not happen") -> None:
    """Waits for what happens in another process."""
    deadline, pause = time.monotonic() + PATIENCE, threading.Event()
    while not true():
        assert time.monotonic() < deadline, what
        pause.wait(0.01)
