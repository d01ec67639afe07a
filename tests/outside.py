"""Daemons that are reached through TLS: certificates of our own, and a door to a hosted daemon."""

from __future__ import annotations

import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blocks import NS, WIDE
from gates import MIB
from hosted import TIMEOUT, Hosted, HostedClient, hosted

import kvstore
from kvstore.block import pack_layout
from kvstore.daemon.channel import Frames
from kvstore.daemon.client import Client
from kvstore.daemon.door import Door
from kvstore.daemon.far import FarLending, Whereabouts, caller_of
from kvstore.daemon.packed import pack_namespace
from kvstore.daemon.peer import Peer
from kvstore.daemon.secured import Secured, client_context, dialled, listening, server_context
from kvstore.daemon.wire import VERSION, Kind, pack
from kvstore.keys import token_bytes
from kvstore.store import CLOSE_SECONDS

TOKENS = {"the token of tenant a": "a", "the token of tenant b": "b"}


@dataclass(frozen=True)
class Papers:
    """A certificate that certifies itself, and its key."""

    certificate: Path
    key: Path


def papers(folder: Path, names: str = "DNS:localhost,IP:127.0.0.1") -> Papers:
    """For whom has these names."""
    folder.mkdir(exist_ok=True)
    made = Papers(folder / "certificate.pem", folder / "key.pem")
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    command = ["openssl", "req", "-x509", *curve, "-subj", "/CN=kvstore", "-addext", f"subjectAltName={names}"]
    subprocess.run([*command, "-keyout", str(made.key), "-out", str(made.certificate)], check=True, capture_output=True)
    made.key.chmod(0o600)
    return made


@dataclass
class Outside:
    """A hosted daemon with a door. ``port``: of loopback."""

    hosted: Hosted
    door: Door
    port: int
    papers: Papers

    def connect(
        self, token: str = "the token of tenant a", port: int | None = None, timeout: float = TIMEOUT, **options: Any
    ) -> Client:
        """A client, which the caller closes."""
        url = f"tls://localhost:{port or self.port}"
        return kvstore.connect(url, token=token, ca=self.papers.certificate, timeout=timeout, **options)

    @property
    def sessions(self) -> int:
        return len(self.hosted.server.sessions)


def tenant_of(peer: Peer, token: str | None) -> str | None:
    """Clients of this machine are tenant a, others have a token."""
    return TOKENS.get(token) if token is not None else "a"


def opened(daemon: Hosted, made: Papers, whose: Callable[[Peer, str | None], str | None]) -> tuple[Door, int]:
    """A door, and the port of loopback that it is at."""
    sock, context = listening("127.0.0.1", 0, 128), server_context(made.certificate, made.key)
    port: int = sock.getsockname()[1]

    def told() -> Door:
        door = Door(daemon.server, context, whose)
        door.listen(sock)
        return door

    return daemon.do(told), port


@contextmanager
def outside(made: Papers, path: Path | None = None, **options: Any) -> Iterator[Outside]:
    """Tenants a and b, each with a token."""
    with hosted(path, names=("a", "b"), tenant_of=tenant_of, **options) as daemon:
        door, port = opened(daemon, made, tenant_of)
        try:
            yield Outside(daemon, door, port, made)
        finally:
            daemon.do(door.close)


class FarHostedClient(HostedClient):
    """A client from outside, whose daemon is at hand."""

    def __init__(self, hosted: Hosted, made: Papers, owns: bool) -> None:
        self._door, port = opened(hosted, made, lambda peer, token: "")
        context = client_context(made.certificate)
        self._place = Whereabouts("127.0.0.1", port, "a token of anybody's", context, 64 * MIB, TIMEOUT)
        super().__init__(hosted, TIMEOUT, owns)

    def _join(self, timeout: float) -> None:
        self._begin(caller_of(self._place), timeout, FarLending())

    def close(self, timeout: float = CLOSE_SECONDS) -> None:
        if not self._closed:
            self.hosted.do(self._door.close)
        super().close(timeout)


class Raw:
    """A client that is none: two TLS connections that say what they like, and read when they are asked to."""

    def __init__(self, at: Outside, token: str | None = "the token of tenant a") -> None:
        self._context = ssl.create_default_context(cafile=at.papers.certificate)
        self._at = at
        self.first, self.second = self._dial(), self._dial()
        said = self.ask(self.first, "hello", VERSION, token)
        self.welcome: list[Any] = said
        if len(said) == 5:
            assert self.ask(self.second, "join", said[4]["join"]) is None

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.first.close()
        self.second.close()

    def _dial(self) -> Secured:
        return dialled("localhost", self._at.port, self._context, time.monotonic() + TIMEOUT)

    def send(self, where: Secured, *value: object) -> None:
        where.settimeout(TIMEOUT)
        where.sendall(pack(Kind.REQUEST, 1, list(value)))

    def read(self, where: Secured) -> Any:
        """The next value that is no event. Raises ``OSError`` when there is none."""
        while True:
            kind, _, value, _ = Frames(where).read(time.monotonic() + TIMEOUT)
            if kind != Kind.EVENT:
                return value

    def ask(self, where: Secured, *value: object) -> Any:
        self.send(where, *value)
        return self.read(where)

    def load(self, tokens: list[int]) -> int:
        """Has the daemon load the layout WIDE's blocks of a chain; the load's name."""
        packed = self.ask(
            self.first, "match", pack_namespace(NS), pack_layout(WIDE), token_bytes(tokens), None, 0, False
        )
        name: int = self.ask(self.first, "load", packed[0][0])[0][0]
        return name
