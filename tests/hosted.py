"""A daemon in a thread of this process: a test sees both what clients see, and what is behind it."""

from __future__ import annotations

import asyncio
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from gates import MIB, PATIENCE

from kvstore.daemon.arenas import Allowance, Arenas
from kvstore.daemon.client import Client
from kvstore.daemon.peer import Peer
from kvstore.daemon.server import Server
from kvstore.daemon.session import Session, Tenant
from kvstore.erasure import Receipt
from kvstore.files import Files, OsFiles
from kvstore.local import LocalStore
from kvstore.match import Match
from kvstore.policies.pace import Pace
from kvstore.store import CLOSE_SECONDS
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.host import HostTier

T = TypeVar("T")
TIMEOUT = 10.0


class Hosted:
    """A server, its loop in a thread, its stores."""

    def __init__(
        self, tenants: dict[str, Tenant], tenant_of: Callable[[Peer, str | None], str | None], **options: Any
    ) -> None:
        self.tenants, self._tenant_of, self._options = tenants, tenant_of, options
        self._folder = tempfile.mkdtemp(prefix="kvstore-hosted-")  # a short path, as sockets need
        self.path = Path(self._folder) / "s"
        self.server: Server
        self._ready, self._stop = threading.Event(), asyncio.Event()
        self.loop: asyncio.AbstractEventLoop
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="hosted")
        self._thread.start()
        assert self._ready.wait(PATIENCE)

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.server = Server(self.tenants, self._tenant_of, **self._options)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.bind(str(self.path))
        sock.listen(512)
        self.server.listen(sock)
        self._ready.set()
        await self._stop.wait()
        await self.server.stop(TIMEOUT)

    @property
    def store(self) -> LocalStore:
        """That of tenant "" ."""
        return self.tenants[""].store

    def do(self, call: Callable[[], T]) -> T:
        """Has the loop's thread call it."""

        async def called() -> T:
            return call()

        return asyncio.run_coroutine_threadsafe(called(), self.loop).result(PATIENCE)

    def connect(self, timeout: float = TIMEOUT, owns: bool = False) -> HostedClient:
        """A client, which the caller closes; with ``owns`` the daemon ends with it."""
        return HostedClient(self, timeout, owns)

    def close(self) -> None:
        """Ends the server, then the stores."""
        self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "the server does not stop"
        for tenant in self.tenants.values():
            tenant.store.close()
            tenant.arenas.close()
        shutil.rmtree(self._folder)


class HostedClient(Client):
    """A client whose daemon is at hand: tests that look into a store look into the one behind it. What it has let go of
    is let go of when it asks for numbers."""

    def __init__(self, hosted: Hosted, timeout: float, owns: bool) -> None:
        self.hosted, self._owns = hosted, owns
        self._join(timeout)

    def _join(self, timeout: float) -> None:
        super().__init__(self.hosted.path, timeout)

    @property
    def session(self) -> Session:
        """Its session, as the daemon has it."""
        connection = self._caller._connection
        assert connection is not None
        return self.hosted.server.sessions[connection.number]

    def settle(self) -> None:
        """Waits until the daemon has heard of all that was let go of."""
        connection, session, heard = self._caller._connection, self.session, threading.Event()
        assert connection is not None
        release = session.release

        def released(number: int, start: int) -> None:
            if number:
                release(number, start)
            else:
                self.hosted.loop.call_soon(heard.set)

        session.release = released  # type: ignore[method-assign]
        connection.let_go(0, 0)
        assert heard.wait(PATIENCE)
        session.release = release  # type: ignore[method-assign]

    def stats(self) -> dict[str, Any]:
        self.settle()
        return super().stats()

    def forget(
        self,
        *,
        tenant: str | None = None,
        owner: str | None = None,
        older_than: float | None = None,
        match: Match | None = None,
    ) -> Receipt:
        self.settle()
        return super().forget(tenant=tenant, owner=owner, older_than=older_than, match=match)

    def flush(self, timeout: float | None = None) -> bool:
        self.settle()
        return super().flush(timeout)

    def close(self, timeout: float = CLOSE_SECONDS) -> None:
        super().close(timeout)
        if self._owns:
            self._owns = False
            self.hosted.close()

    @property
    def _closed(self) -> bool:
        return self._caller._closed

    def __getattr__(self, name: str) -> Any:
        if name in ("_residency", "_mover", "_writer", "_loader", "_saver", "_keeper"):
            return getattr(self.hosted.store, name)
        raise AttributeError(name)


def tenant(
    name: str, path: Path | None, host: int, disk: int, staging: int = 16 * MIB, files: Files | None = None
) -> Tenant:
    """A tenant as ``kvstore serve`` makes it, but as small as one likes."""
    arenas = Arenas(name or "main")
    tier = HostTier(host, memory=arenas)
    below = None if path is None else DiskTier(files or OsFiles(), str(path), disk)
    store = LocalStore(tier, below, *Pace.pair(time.monotonic))
    return Tenant(name, store, tier, arenas, Allowance(staging))


@contextmanager
def hosted(
    path: Path | None = None,
    *,
    host: int = 64 * MIB,
    disk: int = 256 * MIB,
    staging: int = 16 * MIB,
    names: Sequence[str] = ("",),
    tenant_of: Callable[[Peer, str | None], str | None] = lambda peer, token: "",
    **options: Any,
) -> Iterator[Hosted]:
    """A daemon with these tenants, ended afterwards. ``options``: of ``Server``."""
    places = {name: path / "tenants" / name if path is not None and name else path for name in names}
    found = {name: tenant(name, place, host, disk, staging) for name, place in places.items()}
    daemon = Hosted(found, tenant_of, **options)
    try:
        yield daemon
    finally:
        daemon.close()
