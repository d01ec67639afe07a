"""Real engines behind the OpenAI protocol, each in a session of its own, ended by its id when the test is over."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATIENCE = 300.0  # seconds until an engine that does not start says so
PAGE = 128  # tokens of a page of vLLM's cache on a CPU
NAME = "small"  # of the model
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
# On a CPU vLLM gives workers processes of their own, even a single one, unless it is told:
TOGETHER = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def transfer(**extra: object) -> dict[str, Any]:
    """``--kv-transfer-config`` with our connector, and ``extra`` in its own configuration."""
    return {
        "kv_connector": "KVStoreConnector",
        "kv_connector_module_path": "kvstore.adapters.vllm",
        "kv_role": "kv_both",
        "kv_connector_extra_config": extra,
    }


@dataclass
class Engine:
    """One server under way."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def metrics(self) -> dict[str, float]:
        """Sums of its counters, by name."""
        found: dict[str, float] = {}
        for line in _get(f"{self.url}/metrics").decode().splitlines():
            if line and not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                name = name.partition("{")[0]
                found[name] = found.get(name, 0.0) + float(value)
        return found

    def kill(self) -> None:
        """SIGKILL to all its processes: nothing is written any more."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)

    def stop(self) -> None:
        """SIGTERM, as an operator stops it."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.kill()


def begin(model: Path, log: Path, *flags: object, config: Mapping[str, Any] | None = None, **environ: str) -> Engine:
    """Starts a server and does not wait for it."""
    port = _free_port()
    # What `vllm serve` starts; that command looks for a package named "vllm", which the build for CPUs is not.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", NAME]
    command += ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--enable-prompt-tokens-details"]
    command += [*map(str, flags)]
    if config is not None:
        command += ["--kv-transfer-config", json.dumps(config)]
    with open(log, "ab") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env={**os.environ, **ENVIRONMENT, **environ}, start_new_session=True
        )
    return Engine(process, port, log)


def start(model: Path, log: Path, *flags: object, config: Mapping[str, Any] | None = None, **environ: str) -> Engine:
    """Starts it, and waits until it answers."""
    engine = begin(model, log, *flags, config=config, **environ)
    pause, deadline = threading.Event(), time.monotonic() + PATIENCE
    try:
        while not healthy(engine):
            assert engine.process.poll() is None, log.read_text(errors="replace")[-4000:]
            assert time.monotonic() < deadline, log.read_text(errors="replace")[-4000:]
            pause.wait(0.2)
    except BaseException:
        engine.kill()
        raise
    return engine


@contextmanager
def serving(
    model: Path, log: Path, *flags: object, config: Mapping[str, Any] | None = None, **environ: str
) -> Iterator[Engine]:
    """One that is stopped afterwards."""
    engine = start(model, log, *flags, config=config, **environ)
    try:
        yield engine
    finally:
        engine.stop()


def healthy(engine: Engine) -> bool:
    """Whether it answers."""
    try:
        _get(f"{engine.url}/health")
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
    return True


def _get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as reply:
        found: bytes = reply.read()
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        found: int = probe.getsockname()[1]
    return found
