"""What settings must be together, and what they need of the machine."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kvstore.config import MIN_DISK, MIN_HOST
from kvstore.errors import BadInput
from kvstore.settings.document import Keys
from kvstore.settings.schema import SOCKET_NAME, Settings
from kvstore.settings.secret import read_secret, too_open

# A socket's path has 107. It is bound beside where it is to be, with a process id in its name, and then moved there.
SOCKET_BYTES = 98
TENANT_NAME = re.compile(r"[a-z0-9_.-]{1,64}")


@dataclass(frozen=True)
class Fault:
    """A sentence, and the settings that it is about; the first says where it belongs."""

    about: tuple[Keys, ...]
    text: str


def faults(settings: Settings) -> Iterator[Fault]:
    """Everything that is wrong with settings that are right one by one. Reads secret files, and keeps nothing of it."""
    yield from _socket(settings)
    yield from _addresses(settings)
    yield from _tcp(settings)
    yield from _tenants(settings)
    yield from _budgets(settings)
    yield from _secrets(settings)


def _socket(settings: Settings) -> Iterator[Fault]:
    places = {("socket",): settings.socket, ("dir",): settings.dir and settings.dir / SOCKET_NAME}
    for keys, place in places.items():
        size = len(os.fsencode(Path(place).absolute())) if place else 0
        if size > SOCKET_BYTES:
            said = f"{keys[0]}: {place} has {size} bytes, and the path of a socket at most {SOCKET_BYTES}"
            yield Fault((keys,), f"{said}; choose a shorter one")


def _addresses(settings: Settings) -> Iterator[Fault]:
    named = {("http",): settings.http, ("health",): settings.health, ("tcp", "listen"): settings.tcp.listen}
    taken: dict[object, Keys] = {}
    for keys, address in named.items():
        if address is None or not address.port:
            continue
        if address in taken:
            other = ".".join(taken[address])
            yield Fault((keys, taken[address]), f"{'.'.join(keys)} and {other} are both {address}; give each its own")
        taken.setdefault(address, keys)


def _tcp(settings: Settings) -> Iterator[Fault]:
    tcp = settings.tcp
    if tcp.listen is None:
        return
    for name in ("certificate", "private_key"):
        if getattr(tcp, name) is None:
            yield Fault(
                (("tcp", "listen"), ("tcp", name)), f"tcp.listen needs TLS; set tcp.{name}, too, or leave it off"
            )
    if not any(tenant.token_file for tenant in settings.tenants.values()):
        said = "tcp.listen needs a tenant with a token_file, because nobody else could come in"
        yield Fault((("tcp", "listen"), ("tenants",)), said)
    if tcp.certificate and not os.path.isfile(tcp.certificate):
        yield Fault((("tcp", "certificate"),), f"tcp.certificate: there is no file {tcp.certificate}")


def _tenants(settings: Settings) -> Iterator[Fault]:
    users: dict[int, str] = {}
    for name, tenant in settings.tenants.items():
        keys = ("tenants", name)
        if not TENANT_NAME.fullmatch(name) or not name.strip("."):
            said = f"{name!r} is no name for a tenant; use 1 to 64 of a-z 0-9 _ . - and not dots alone"
            yield Fault((keys,), said)
            continue
        if not tenant.uids and not tenant.token_file:
            yield Fault((keys,), f"nobody can be tenant {name}; give it uids or a token_file")
        for uid in tenant.uids:
            if uid in users:
                said = f"uid {uid} is tenant {users[uid]} and tenant {name}; leave it with one of them"
                yield Fault(((*keys, "uids"), ("tenants", users[uid], "uids")), said)
            users.setdefault(uid, name)


def _budgets(settings: Settings) -> Iterator[Fault]:
    for tier, least in (("host", MIN_HOST), ("disk", MIN_DISK)):
        if min(getattr(budget, tier) for budget in settings.budgets.values()) < least:
            about = [("tenants", name, tier) for name in settings.tenants]
            said = f"{tier} is what all tenants have together, and is too little for what they want"
            yield Fault(((tier,), *about), f"{said}; at least {least >> 20}MiB must be left for everybody else")
    if settings.staging_bytes > settings.host:
        yield Fault((("staging",), ("host",)), "staging is a part of host memory, and cannot be more than host")


def _secrets(settings: Settings) -> Iterator[Fault]:
    files: dict[Keys, Path | None] = {("redis", "key_file"): settings.redis.key_file}
    files[("tcp", "private_key")] = settings.tcp.private_key
    files |= {("tenants", name, "token_file"): tenant.token_file for name, tenant in settings.tenants.items()}
    tokens: dict[bytes, Keys] = {}
    for keys, path in files.items():
        if path is None:
            continue
        try:
            secret = read_secret(path, ".".join(keys))
        except BadInput as error:
            yield Fault((keys,), str(error))
            continue
        if keys[0] == "tenants" and not _is_text(secret):
            yield Fault((keys,), f"{'.'.join(keys)}: {path} holds no text, which a token must be; base64 makes it so")
        if keys[0] == "tenants" and secret in tokens:
            said = f"{'.'.join(keys)} holds the same token as {'.'.join(tokens[secret])}; give each tenant its own"
            yield Fault((keys, tokens[secret]), said)
        if keys[0] == "tenants":
            tokens.setdefault(secret, keys)
    if folder := settings.encryption.key_dir:
        if os.path.exists(folder) and not os.path.isdir(folder):
            yield Fault((("encryption", "key_dir"),), f"encryption.key_dir: {folder} is no folder")
        elif os.path.isdir(folder) and (complaint := too_open(folder, "encryption.key_dir", folder.stat())):
            yield Fault((("encryption", "key_dir"),), complaint)


def _is_text(secret: bytes) -> bool:
    try:
        return secret.decode().isprintable()
    except UnicodeDecodeError:
        return False
