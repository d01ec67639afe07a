"""``kvstore serve``: from settings to a process that listens, and back to nothing when it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import grp
import hmac
import logging
import os
import resource
import signal
import socket
import ssl
import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial
from hashlib import blake2b
from pathlib import Path

from kvstore import __version__
from kvstore.checksum import KERNELS
from kvstore.config import serving
from kvstore.daemon import SOCKET
from kvstore.daemon.arenas import Allowance, Arenas
from kvstore.daemon.door import Door
from kvstore.daemon.failures import Failures
from kvstore.daemon.http import Monitor
from kvstore.daemon.peer import Peer
from kvstore.daemon.secured import listening as tcp_listener
from kvstore.daemon.secured import server_context
from kvstore.daemon.server import Server
from kvstore.daemon.session import Tenant
from kvstore.daemon.watched import SessionInfo
from kvstore.errors import BadInput, StoreBusy
from kvstore.remote.options import RemoteOptions
from kvstore.settings.rows import explain
from kvstore.settings.schema import Settings
from kvstore.settings.secret import read_secret
from kvstore.store import Store
from kvstore.tiers.host import madvise

log = logging.getLogger("kvstore")

BACKLOG = 128
MADV_DONTNEED = 4
M_ARENA_MAX = -8
FIRST_FD = 3  # of sockets that systemd passes
TENANTS = "tenants"  # the folder of their directories, in that of the daemon, and of their keys, in that of its own


def tenants_of(settings: Settings) -> dict[str, Tenant]:
    """Opens a store for each tenant. Raises as ``kvstore.open``."""
    found: dict[str, Tenant] = {}
    try:
        for name, budget in settings.budgets.items():
            share = settings.staging_bytes * budget.host // settings.host
            arenas = Arenas(name or "main")
            place = settings.dir / TENANTS / name if settings.dir and name else settings.dir
            redis = redis_of(settings, name)
            keys = settings.encryption.key_dir
            keys = keys / TENANTS / name if keys and name else keys
            store, tier = serving(place, max(budget.host - share, 1), budget.disk, arenas, redis, keys)
            found[name] = Tenant(name, store, tier, arenas, Allowance(share), remote=redis is not None)
    except BaseException:
        for tenant in found.values():
            tenant.store.close()
        raise
    return found


def redis_of(settings: Settings, tenant: str) -> RemoteOptions | None:
    """What a tenant's store has beyond this host: under a prefix of the tenant's own."""
    redis = settings.redis
    if redis.url is None:
        return None
    key = read_secret(redis.key_file, "redis.key_file") if redis.key_file else None
    prefix = f"{redis.prefix}:{tenant}" if tenant else redis.prefix
    url, budget = redis.url.get_secret_value(), redis.budget
    return RemoteOptions(url, prefix, redis.ttl, budget, redis.lookup, redis.timeout, key=key)


def tenant_of(settings: Settings, tokens: Mapping[str, bytes], peer: Peer, token: str | None) -> str | None:
    """The tenant that a peer is bound to; None: it is not served. ``tokens``: by tenant."""
    if token is not None:
        digest = _digest(token.encode(errors="replace"))
        return next((name for name, known in tokens.items() if hmac.compare_digest(digest, known)), None)
    for name, tenant in settings.tenants.items():
        if peer.uid in tenant.uids:
            return name
    known = {*settings.allow_uids, os.getuid()}
    return "" if not settings.allow_uids or peer.uid in known else None


def tokens_of(settings: Settings) -> dict[str, bytes]:
    """Digests of tenants' tokens: of what is compared, only the digest's bytes can show in its time."""
    files = {name: tenant.token_file for name, tenant in settings.tenants.items() if tenant.token_file}
    return {name: _digest(read_secret(file, f"tenants.{name}.token_file")) for name, file in files.items()}


def _digest(token: bytes) -> bytes:
    return blake2b(token, digest_size=32).digest()


def listening(settings: Settings) -> tuple[list[socket.socket], list[Path]]:
    """Listening sockets, and the paths that are to be removed in the end. Raises ``BadInput``."""
    passed = _passed()
    if passed:
        return passed, []
    places = [place for place in (settings.dir and settings.dir / SOCKET, settings.socket) if place]
    if not places:
        raise BadInput("serve needs a directory or a socket: give --dir or --socket")
    socks: list[socket.socket] = []
    for place in dict.fromkeys(places):
        socks.append(_listener(place, settings.socket_mode, settings.socket_group))
    return socks, list(dict.fromkeys(places))


def outside(settings: Settings) -> tuple[ssl.SSLContext, socket.socket] | None:
    """What this daemon is for other machines, and where it listens for them, if it does. Raises ``BadInput``."""
    tcp = settings.tcp
    if tcp.listen is None:
        return None
    assert tcp.certificate and tcp.private_key  # or the settings would not be valid
    context = server_context(tcp.certificate, tcp.private_key)
    return context, tcp_listener(tcp.listen.host, tcp.listen.port, BACKLOG)


def _passed() -> list[socket.socket]:
    """Sockets that whoever started this process listens on for it."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    count = int(os.environ.get("LISTEN_FDS", "0"))
    return [socket.socket(fileno=fd) for fd in range(FIRST_FD, FIRST_FD + count)]


def _listener(place: Path, mode: int, group: str | int | None) -> socket.socket:
    """Binds under a name of its own and moves it into place: nobody sees a socket that is open too wide, and one that a
    killed daemon left is replaced."""
    if place.exists() and not place.is_socket():
        raise BadInput(f"{place} is there, and no socket; choose another --socket")
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.settimeout(1.0)
        other.connect(os.fsencode(place))
        raise StoreBusy(f"a daemon listens at {place} already; stop it first")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        new = place.with_name(f".{place.name}.{os.getpid()}")
        new.unlink(missing_ok=True)
        sock.bind(os.fsencode(new))
        if group is not None:
            gid = group if isinstance(group, int) else grp.getgrnam(group).gr_gid
            os.chown(new, -1, gid)
        os.chmod(new, mode)
        sock.listen(BACKLOG)
        os.replace(new, place)
    except (OSError, KeyError) as error:
        sock.close()
        raise BadInput(f"no socket can be made at {place}: {error}; choose another --socket") from error
    finally:
        os.umask(before)
    return sock


def let_go(own: Mapping[Path, int]) -> None:
    """Removes sockets, by place and inode; a daemon that was started meanwhile may have put another one there."""
    for place, inode in own.items():
        with contextlib.suppress(OSError):
            if place.stat().st_ino == inode:
                place.unlink()


def notify(state: str) -> None:
    """Tells systemd, where it is there to be told."""
    place = os.environ.get("NOTIFY_SOCKET", "")
    if place:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(state.encode(), "\0" + place[1:] if place.startswith("@") else place)


def serve(settings: Settings) -> None:
    """Serves until SIGTERM or SIGINT. Raises ``BadInput``, ``StoreBusy``."""
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(message)s")
    ctypes.CDLL(None).mallopt(M_ARENA_MAX, 2)  # or each of many threads would keep what it had once
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    tenants = tenants_of(settings)
    own, socks, far = dict[Path, int](), list[socket.socket](), None
    try:
        far = outside(settings)
        socks, paths = listening(settings)
        own = {place: place.stat().st_ino for place in paths}
        asyncio.run(_serve(settings, tenants, socks, own, far))
    finally:
        for sock in socks if far is None else [*socks, far[1]]:
            sock.close()
        let_go(own)
        for tenant in tenants.values():
            tenant.store.close(settings.drain)
            tenant.arenas.close()


class Watch:
    """A server, as monitoring sees it."""

    def __init__(self, server: Server, failures: Failures) -> None:
        self._server, self._failures = server, failures

    @property
    def stores(self) -> Mapping[str, Store]:
        """By tenant."""
        return {name: tenant.store for name, tenant in self._server.tenants.items()}

    def sessions(self) -> Sequence[SessionInfo]:
        """All clients. Any thread."""
        found = []
        for session in list(self._server.sessions.values()):
            leases, drafts, staged = session.held
            who = session.number, session.tenant.name, session.peer.uid, session.peer.pid
            found.append(SessionInfo(*who, session.since, leases, drafts, staged))
        return found

    def refused(self) -> int:
        """So far."""
        return self._server.refused

    def uptime(self) -> float:
        """Seconds."""
        return time.monotonic() - self._server.started

    def ready(self) -> str:
        """It can serve from when it is there to be asked until it is told to stop."""
        return "" if self._server.open else "it is stopping"

    def failures(self) -> Sequence[tuple[float, str]]:
        """Oldest first."""
        return self._failures.recent()


def settle() -> None:
    """Has checksums compiled, and gives the compiler's own code back to the system: it is not needed again."""
    KERNELS.wait()
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError as error:
        log.warning("the compiler's code stays in memory: %s", error)
        return
    for line in lines:
        if "llvmlite" in line and " r-xp " in line:  # code alone: other parts have been written to
            start, end = (int(place, 16) for place in line.split()[0].split("-"))
            madvise(start, end - start, MADV_DONTNEED)


async def _serve(
    settings: Settings,
    tenants: dict[str, Tenant],
    socks: list[socket.socket],
    own: Mapping[Path, int],
    far: tuple[ssl.SSLContext, socket.socket] | None,
) -> None:
    bound = partial(tenant_of, settings, tokens_of(settings))
    about = {"version": __version__} | {row.name: row.value for row in explain(settings)}
    server = Server(tenants, bound, settings.lease_ttl, settings.max_sessions, settings.max_frame, about)
    failures = Failures()
    failures.attach()
    monitor = Monitor(Watch(server, failures), settings.http, settings.health, __version__)
    if settings.http is not None or settings.health is not None:
        monitor.start()
    for sock in socks:
        server.listen(sock)
    door = None
    if far is not None:
        context, sock = far
        door = Door(server, context, bound)
        door.listen(sock)
        socks = [*socks, sock]
    threading.Thread(target=settle, name="kvstore-settle", daemon=True).start()
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    log.info("serving %s", ", ".join([*map(str, own), *(str(sock.getsockname()) for sock in socks[len(own) :])]))
    notify("READY=1")
    await stop.wait()
    notify("STOPPING=1")
    if door is not None:
        door.close()
    await server.stop(settings.drain)
    monitor.close()
    failures.close()
