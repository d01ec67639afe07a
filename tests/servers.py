"""Real Redis servers for tests: alone, with TLS, with users, as a cluster, behind Sentinel. Tests start their own, on
ports of loopback that nobody else has, and end what they started and nothing else."""

from __future__ import annotations

import functools
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import redis

PATIENCE = 20.0  # seconds until a server is there
_INSTALLING = "/tmp/kvstore-tests-install-redis.lock"


@functools.cache
def program(name: str = "redis-server") -> str:
    """Where the program is; installed where that is allowed, and skipped with a reason where it is not."""
    found = shutil.which(name)
    if found is None and os.geteuid() == 0 and shutil.which("apt-get"):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
        for command in (["apt-get", "update"], ["apt-get", "install", "-y", "redis-server"]):
            subprocess.run(command, check=False, timeout=300, env=environment, **quiet)  # type: ignore[call-overload]
        found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed, and cannot be: install the package redis-server")
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
    options: dict[str, object] = field(default_factory=dict)  # how tests talk to it beside the store

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


def start(folder: Path, *arguments: str, port: int | None = None, **options: object) -> Server:
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


def wait_until(true: object, what: str = "it does not happen") -> None:
    """Until a condition of the world outside holds."""
    assert callable(true)
    deadline, pause = time.monotonic() + PATIENCE, threading.Event()
    while not true():
        assert time.monotonic() < deadline, what
        pause.wait(0.01)


@contextmanager
def running(*arguments: str, port: int | None = None, **options: object) -> Iterator[Server]:
    """A server, ended afterwards."""
    with tempfile.TemporaryDirectory(prefix="kvstore-redis-") as folder:
        server = start(Path(folder), *arguments, port=port, **options)
        try:
            yield server
        finally:
            server.kill()


@dataclass(frozen=True)
class Certificates:
    """A certificate of an authority of our own, and one of 127.0.0.1 that it signed."""

    authority: Path
    certificate: Path
    key: Path


def certificates(folder: Path) -> Certificates:
    """Makes them with openssl."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    made = Certificates(folder / "ca.pem", folder / "server.pem", folder / "server.key")
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    extra = folder / "names"
    extra.write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
    own = ("-x509", *curve, "-subj", "/CN=test", "-keyout", str(folder / "ca.key"), "-out", str(made.authority))
    asked = (*curve[:-2], "-subj", "/CN=127.0.0.1", "-keyout", str(made.key), "-out", str(folder / "asked"))
    signed = ("-in", str(folder / "asked"), "-CA", str(made.authority), "-CAkey", str(folder / "ca.key"))
    for command in (
        ("req", *own),
        ("req", *asked),
        (
            "x509",
            "-req",
            *signed,
            "-CAcreateserial",
            "-days",
            "2",
            "-extfile",
            str(extra),
            "-out",
            str(made.certificate),
        ),
    ):
        subprocess.run(["openssl", *command], check=True, capture_output=True, timeout=60)
    return made


@contextmanager
def with_tls() -> Iterator[tuple[Server, Certificates]]:
    """A server that speaks TLS only."""
    with tempfile.TemporaryDirectory(prefix="kvstore-redis-") as folder:
        made, port = certificates(Path(folder)), free_port()
        listening = ("--port", "0", "--tls-port", str(port), "--tls-auth-clients", "no")
        files = ("--tls-cert-file", made.certificate, "--tls-key-file", made.key, "--tls-ca-cert-file", made.authority)
        options = {"ssl": True, "ssl_ca_certs": str(made.authority)}
        with running(*listening, *map(str, files), port=port, **options) as server:
            yield server, made


@contextmanager
def cluster(nodes: int = 3) -> Iterator[list[Server]]:
    """A cluster without replicas, all slots served."""
    with ExitStack() as stack:
        servers = [
            stack.enter_context(running("--cluster-enabled", "yes", "--cluster-config-file", "nodes"))
            for _ in range(nodes)
        ]
        join(servers)
        yield servers


def join(servers: Sequence[Server]) -> None:
    """Makes servers that began alone one cluster."""
    share = 16384 // len(servers)
    for at, server in enumerate(servers):
        end = 16383 if at == len(servers) - 1 else (at + 1) * share - 1
        with server.client() as client:
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", at * share, end)
            client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", at + 1)
            if at:
                client.execute_command("CLUSTER", "MEET", "127.0.0.1", servers[0].port)
    for server in servers:
        with server.client() as client:

            def whole(client: redis.Redis = client) -> bool:
                said = client.execute_command("CLUSTER", "INFO")
                return b"cluster_state:ok" in said and b"cluster_known_nodes:%d" % len(servers) in said

            wait_until(whole, "the cluster does not come together")


@contextmanager
def sentinel(server: Server, name: str = "main") -> Iterator[int]:
    """A Sentinel that watches a server; its port."""
    with tempfile.TemporaryDirectory(prefix="kvstore-sentinel-") as folder:
        port = free_port()
        file = Path(folder) / "sentinel.conf"
        file.write_text(f"port {port}\nbind 127.0.0.1\nsentinel monitor {name} 127.0.0.1 {server.port} 1\n")
        with open(Path(folder) / "log", "wb") as log:
            process = subprocess.Popen([program(), str(file), "--sentinel"], stdout=log, stderr=log)
        watcher = Server(port, Path(folder), process)
        try:
            wait_until(lambda: answers(watcher), "Sentinel does not start")
            yield port
        finally:
            watcher.kill()
