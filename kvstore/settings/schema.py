"""The one schema: what can be set, what it means, and what holds when nothing is said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr, WrapSerializer

from kvstore.settings.values import (
    DAY,
    Bound,
    Count,
    DiskShare,
    DiskSize,
    Drain,
    Format,
    FrameSize,
    Group,
    HostShare,
    HostSize,
    Lease,
    Level,
    Lifetime,
    Listen,
    Loopback,
    Mode,
    Place,
    Prefix,
    Share,
    Uids,
    Url,
    Wait,
)

SOCKET_NAME = "kvstore.sock"  # in the directory of a daemon that has one
_AS_DICT = WrapSerializer(lambda frozen, dump: dump(dict(frozen)))


def setting(default: object, description: str) -> Any:
    """What holds when nothing is said, and what it means."""
    return Field(default, description=description)


class Table(BaseModel):
    """Settings under one name. Immutable."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class Redis(Table):
    """A Redis that several hosts share."""

    url: Url = setting(None, "The server, Sentinel or Cluster, with user and password where it wants them.")
    prefix: Prefix = setting("kvstore", "What all keys begin with; hosts with the same prefix share blocks.")
    ttl: Lifetime = setting(7 * DAY, "How long a block stays there that nobody asks for.")
    budget: Bound = setting(None, "Bytes that blocks may take there; the ones unused for longest go first.")
    lookup: Wait = setting(0.02, "How long a match waits to learn what is there.")
    timeout: Wait = setting(1.0, "How long any other call waits, in all.")
    key_file: Place = setting(None, "A secret file; its bytes authenticate what is written and read there.")


class Tenant(Table):
    """Whose blocks are kept apart from all others'. The daemon knows it by the peer's uid, or by a token."""

    uids: Uids = setting((), "Peers with these uids are this tenant.")
    token_file: Place = setting(None, "A secret file; who sends its text is this tenant.")
    host: HostShare = setting(None, "Its part of host memory; without it, an equal part of what is left.")
    disk: DiskShare = setting(None, "Its part of the disk; without it, an equal part of what is left.")


class Encryption(Table):
    """Blocks at rest."""

    key_dir: Place = setting(None, "Encrypt what is on disk, with one key a namespace, kept in this folder.")


class Tcp(Table):
    """Clients from other machines. Only with TLS, and only those who have a tenant's token."""

    listen: Listen = setting(None, "Where clients from outside connect; wants a certificate and a token.")
    certificate: Place = setting(None, "The certificate and its chain, in PEM.")
    private_key: Place = setting(None, "A secret file; the certificate's key, in PEM.")


@dataclass(frozen=True)
class Budget:
    """What one tenant may fill, in bytes."""

    host: int
    disk: int


class Settings(Table):
    """All that ``kvstore serve`` can be told. Made by ``load``, which alone sees whether settings go together.

    Equal settings say the same, wherever they came from. Immutable; any thread.
    """

    dir: Place = setting(None, "The cache directory; without it blocks are in memory only.")
    host: HostSize = setting(4 << 30, "Host memory for blocks, of all tenants together.")
    disk: DiskSize = setting(64 << 30, "Disk space for blocks and their index, of all tenants together.")
    staging: Share = setting(0.25, "How much of host memory clients may be filling at once.")
    socket: Place = setting(None, f"A socket for clients; a daemon with a directory always has DIR/{SOCKET_NAME}, too.")
    socket_mode: Mode = setting(0o600, "Who may connect: 0600 its user, 0660 its group, too, 0666 all.")
    socket_group: Group = setting(None, "The group that the socket is given to, by name or number.")
    allow_uids: Uids = setting(
        (), description="Who may connect, beside this user and tenants' uids; without it, whom the socket lets in."
    )
    lease_ttl: Lease = setting(10.0, "How long a client that says nothing keeps blocks where they are.")
    drain: Drain = setting(20.0, "How long a daemon that is told to stop waits for what is under way.")
    http: Loopback = setting(None, "Metrics, health and the dashboard, on this machine only.")
    health: Listen = setting(None, "/livez and /readyz, and nothing else, for probes from anywhere.")
    max_sessions: Count = setting(256, "How many clients may be connected at once.")
    max_frame: FrameSize = setting(32 << 20, "The longest message a client may send; longer ones end it.")
    log_level: Level = setting("info", "The least that is logged.")
    log_format: Format = setting("text", "Lines of text, or one JSON object a line.")
    redis: Redis = Redis()
    encryption: Encryption = Encryption()
    tcp: Tcp = Tcp()
    tenants: Annotated[Mapping[str, Tenant], AfterValidator(MappingProxyType), _AS_DICT] = Field(
        default_factory=lambda: MappingProxyType({}), description="Those who share nothing, by name."
    )
    _origins: Mapping[tuple[str, ...], str] = PrivateAttr(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Settings):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in type(self).model_fields)

    __hash__ = None  # type: ignore[assignment]  # tenants have none

    def origin(self, keys: tuple[str, ...]) -> str:
        """What set a setting: a line of a file, a variable, a flag, or "default"."""
        return self._origins.get(keys, "default")

    def came_from(self, origins: Mapping[tuple[str, ...], str]) -> None:
        """Says what set each, once, by who loads them."""
        self._origins = dict(origins)

    @property
    def socket_path(self) -> Path | None:
        """Where clients find the daemon; None where neither a socket nor a directory is named."""
        return self.socket or (self.dir / SOCKET_NAME if self.dir else None)

    @property
    def staging_bytes(self) -> int:
        """Bytes that clients may be filling at once."""
        return self.staging if isinstance(self.staging, int) else int(self.staging * self.host)

    @property
    def budgets(self) -> dict[str, Budget]:
        """What each tenant may fill; "" is everybody who is no named tenant."""
        named = {"": Tenant(), **self.tenants}
        hosts = _parts(self.host, [tenant.host for tenant in named.values()])
        disks = _parts(self.disk, [tenant.disk for tenant in named.values()])
        return {name: Budget(host, disk) for name, host, disk in zip(named, hosts, disks, strict=True)}


def _parts(whole: int, wanted: list[int | None]) -> list[int]:
    """Who wants nothing in particular gets an equal part of what the others leave."""
    rest = whole - sum(part or 0 for part in wanted)
    return [part if part is not None else rest // wanted.count(None) for part in wanted]
