"""A daemon of its own for a benchmark, which ends with it."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import kvstore
from kvstore.bench.micro.daemon import PATIENCE
from kvstore.errors import BadInput, Unreachable


def daemon(stack: ExitStack, folder: Path, host: str, redis: str | None = None, disk: str = "256MiB") -> str:
    """Starts one, and waits until it listens."""
    command = [sys.executable, "-m", "kvstore.cli", "serve", "--dir", str(folder), "--host", host, "--disk", disk]
    process = subprocess.Popen([*command, *(["--redis", redis] if redis else [])])

    def stop() -> None:
        process.send_signal(signal.SIGTERM)
        process.wait()

    stack.callback(stop)
    pause = threading.Event()
    for _ in range(int(PATIENCE / 0.1)):
        try:
            kvstore.connect(folder).close()
            return str(folder)
        except (Unreachable, BadInput):
            if process.poll() is not None:
                break
            pause.wait(0.1)
    raise Unreachable("the daemon did not start; what it says is above")
