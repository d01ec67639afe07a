"""Real Redis servers for tests: alone, with TLS, with users, as a cluster, behind Sentinel. Tests start their own, on
ports of loopback that nobody else has, and end what they started and nothing else."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis

from kvstore.bench.remote.server import Server, answers, free_port, program, wait_until
from kvstore.bench.remote.server import running as begun
from kvstore.errors import BadInput


@functools.cache
def install() -> None:
    """Installs redis-server where it is missing and that is allowed, and skips with a reason where it is not."""
    if shutil.which("redis-server") is None and os.geteuid() == 0 and shutil.which("apt-get"):
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}  # nothing starts of itself
        for command in (["apt-get", "update"], ["apt-get", "install", "-y", "redis-server"]):
            subprocess.run(command, check=False, timeout=300, env=environment, capture_output=True)
    try:
        program()
    except BadInput as error:
        pytest.skip(f"{error}; it cannot be installed from here")


@contextmanager
def running(*arguments: str, port: int | None = None, **options: Any) -> Iterator[Server]:
    """A server, ended afterwards."""
    install()
    with begun(*arguments, port=port, **options) as found:
        yield found


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
        options: dict[str, Any] = {"ssl": True, "ssl_ca_certs": str(made.authority)}
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
def sentinel(watched: Server, name: str = "main") -> Iterator[int]:
    """A Sentinel that watches a server; its port."""
    with tempfile.TemporaryDirectory(prefix="kvstore-sentinel-") as folder:
        port = free_port()
        file = Path(folder) / "sentinel.conf"
        file.write_text(f"port {port}\nbind 127.0.0.1\nsentinel monitor {name} 127.0.0.1 {watched.port} 1\n")
        with open(Path(folder) / "log", "wb") as log:
            process = subprocess.Popen([program(), str(file), "--sentinel"], stdout=log, stderr=log)
        watcher = Server(port, Path(folder), process)
        try:
            wait_until(lambda: answers(watcher), "Sentinel does not start")
            yield port
        finally:
            watcher.kill()
