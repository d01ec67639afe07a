"""Clients of one Redis server, of Sentinel's master or of a Cluster, by URL.

All their sockets keep to the bounds of the thread that uses them, what fails is not tried again behind its back, and
nothing of a URL but its hosts is ever shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any
from urllib.parse import unquote, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode
from redis.connection import parse_url
from redis.retry import Retry
from redis.sentinel import Sentinel, SentinelConnectionPool, SentinelManagedConnection, SentinelManagedSSLConnection

from kvstore.errors import BadInput
from kvstore.tiers.bounded import BoundedSocket, time_left

CEILING = 60.0  # seconds for one receive, should a call ever come without bounds
CONNECTIONS = 64  # at most, to one server
READ_BYTES = 1 << 20  # of one receive, at most
CUTOFF = 6000  # bytes from which an argument is sent as it is, not copied into its command
SCHEMES = {"redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster"}
PORTS = {"sentinel": 26379}
# A new connection does not first say which library it is of, in two exchanges; redis-py has changed how to have that.
# With TLS it does: what comes behind the handshake has to be read by an exchange, or is taken for an answer later.
_says = signature(redis.connection.AbstractConnection).parameters
SILENT = {"driver_info": None} if "driver_info" in _says else {"lib_name": None, "lib_version": None}
_SHAPES = {
    "sentinel": "redis+sentinel://host:port,host:port/service/db",
    "cluster": "redis+cluster://host:port,host:port",
}


class Packer:
    """Commands as bytes. Large arguments are passed on as views of their own memory."""

    def pack(self, *arguments: Any) -> list[Any]:
        """What to send, piece by piece. Commands of two words come as one argument."""
        name = arguments[0] if isinstance(arguments[0], bytes) else str(arguments[0]).encode()
        arguments = (*name.split(), *arguments[1:])
        pieces: list[Any] = []
        text = bytearray(b"*%d\r\n" % len(arguments))
        for argument in arguments:
            data = argument if isinstance(argument, bytes | memoryview) else str(argument).encode()
            text += b"$%d\r\n" % len(data)
            if len(data) > CUTOFF:
                pieces += [bytes(text), memoryview(data)]
                text = bytearray()
            else:
                text += data
            text += b"\r\n"
        return [*pieces, bytes(text)]


class _Bounded:
    """A connection, mixed into each kind that there is."""

    socket_timeout: Any
    socket_connect_timeout: Any

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"command_packer": Packer(), **options})

    def _connect(self) -> BoundedSocket:
        left, before = time_left(), (self.socket_timeout, self.socket_connect_timeout)
        if left is not None:
            self.socket_timeout = self.socket_connect_timeout = left
        try:
            sock = BoundedSocket(super()._connect())  # type: ignore[misc]
        finally:
            self.socket_timeout, self.socket_connect_timeout = before
        sock.settimeout(self.socket_timeout)
        return sock


class Plain(_Bounded, redis.Connection):
    """TCP."""


class Tls(_Bounded, redis.SSLConnection):
    """TLS."""


class Local(_Bounded, redis.UnixDomainSocketConnection):
    """A Unix socket."""


class Managed(_Bounded, SentinelManagedConnection):
    """TCP to the master that Sentinel names."""


class ManagedTls(_Bounded, SentinelManagedSSLConnection):
    """TLS to it."""


@dataclass(frozen=True)
class Target:
    """What a URL stands for. ``kind``: "single", "sentinel" or "cluster"."""

    kind: str
    hosts: Sequence[tuple[str, int]]
    options: Mapping[str, Any] = field(repr=False)  # of a connection: secrets are among them
    tls: bool
    service: str
    place: str  # what may be shown


def target(url: str) -> Target:
    """Reads a URL. Raises ``BadInput``, which never quotes it: it may hold a password."""
    text: object = url
    scheme, _, rest = text.partition("://") if isinstance(text, str) else ("", "", "")
    if scheme not in SCHEMES or not rest:
        raise BadInput(f"redis= is a URL that begins with one of {', '.join(f'{s}://' for s in sorted(SCHEMES))}")
    base, _, kind = scheme.partition("+")
    try:
        return _several(base, kind, rest) if kind else _single(url)
    except ValueError as error:
        if isinstance(error, BadInput):
            raise
        reason = str(error) if str(error).startswith("Invalid value for") else "a port or an option makes no sense"
        raise BadInput(f"redis= cannot be read: {reason}") from None


def _single(url: str) -> Target:
    parts, options = urlsplit(url), parse_url(url)
    place = unquote(parts.path) if parts.scheme == "unix" else f"{parts.hostname or 'localhost'}:{parts.port or 6379}"
    kinds = {"redis": Plain, "rediss": Tls, "unix": Local}
    return _checked("single", [], {**options, "connection_class": kinds[parts.scheme]}, place)


def _several(base: str, kind: str, rest: str) -> Target:
    """A URL with several hosts."""
    parts = urlsplit(f"{base}://{rest}")
    user, at, names = parts.netloc.rpartition("@")
    hosts = []
    for name in names.split(","):
        one = urlsplit(f"{base}://{name}")
        if not one.hostname:
            raise BadInput(f"redis= names a host that is none; write it as {_SHAPES[kind]}")
        hosts.append((one.hostname, one.port or PORTS.get(kind, 6379)))
    path = [unquote(word) for word in parts.path.split("/") if word]
    service = path.pop(0) if kind == "sentinel" and path else ""
    if (kind == "sentinel" and not service) or len(path) > (kind == "sentinel") or not all(map(str.isdigit, path)):
        raise BadInput(f"redis= has a path that means nothing here; write it as {_SHAPES[kind]}")
    options = parse_url(f"{base}://{user}{at}{hosts[0][0]}:{hosts[0][1]}?{parts.query}")
    for name in ("host", "port", "db"):
        options.pop(name, None)
    if path:
        options["db"] = int(path[0])
    kinds = {"sentinel": (Managed, ManagedTls), "cluster": (Plain, Tls)}
    options["connection_class"] = kinds[kind][base == "rediss"]
    return _checked(kind, hosts, options, ",".join(f"{host}:{port}" for host, port in hosts), service)


def _checked(kind: str, hosts: list[tuple[str, int]], options: dict[str, Any], place: str, service: str = "") -> Target:
    limits = {"socket_timeout": CEILING, "socket_connect_timeout": CEILING, "retry": Retry(NoBackoff(), 0)}
    made = options["connection_class"]
    tls = issubclass(made, redis.SSLConnection)
    options = {"socket_read_size": READ_BYTES, **options, **limits, **({} if tls else SILENT), "protocol": 2}
    probe = {name: value for name, value in options.items() if name not in ("connection_class", "max_connections")}
    probe = {name: value for name, value in probe.items() if not name.startswith("sentinel_")}
    try:
        made(**probe, **({"connection_pool": None} if kind == "sentinel" else {}))
    except (TypeError, redis.RedisError):
        raise BadInput("redis= has an option in its query that redis-py does not know") from None
    return Target(kind, hosts, options, tls, service, place)


def client(where: Target) -> Any:
    """A client. That of a cluster asks it for its nodes, within the caller's bounds; others connect later."""
    options = {"max_connections": CONNECTIONS, **where.options}
    if where.kind == "cluster":
        options.pop("retry")
        nodes = [ClusterNode(host, port) for host, port in where.hosts]
        host, port = where.hosts[0]
        url = f"redis://[{host}]:{port}" if ":" in host else f"redis://{host}:{port}"
        return redis.RedisCluster(url=url, startup_nodes=nodes, retry=Retry(NoBackoff(), 1), **options)
    if where.kind == "single":
        return redis.Redis(connection_pool=redis.ConnectionPool(**options))
    watching = {name.removeprefix("sentinel_"): options.pop(name) for name in list(options) if name[:9] == "sentinel_"}
    manager = Sentinel([])
    tls = {name: value for name, value in options.items() if name.startswith("ssl_")}
    shared = {
        **tls,
        **({} if where.tls else SILENT),
        "socket_timeout": CEILING,
        "socket_connect_timeout": CEILING,
        "protocol": 2,
        **watching,
    }
    shared["connection_class"] = Tls if where.tls else Plain
    pools = [redis.ConnectionPool(host=host, port=port, **shared) for host, port in where.hosts]
    manager.sentinels = [redis.Redis(connection_pool=pool) for pool in pools]
    return redis.Redis(connection_pool=SentinelConnectionPool(where.service, manager, **options))


def disconnect(made: Any) -> None:
    """Ends all connections of a client, under whoever uses them too; it connects anew when it is used again."""
    if isinstance(made, redis.RedisCluster):
        made.disconnect_connection_pools()
        return
    made.connection_pool.disconnect()
    manager = getattr(made.connection_pool, "sentinel_manager", None)
    for sentinel in manager.sentinels if manager is not None else ():
        sentinel.connection_pool.disconnect()
