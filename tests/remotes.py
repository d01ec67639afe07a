"""Stores that share blocks, through Redis or through its naive twin, and what tests want to know of them."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

from blocks import NS, SMALL, ids, recount
from gates import PATIENCE, Gate

from kvstore import Layout, Namespace
from kvstore.bench.remote.server import Server
from kvstore.errors import TierError
from kvstore.files import OsFiles
from kvstore.hot import Hot
from kvstore.local import LocalStore
from kvstore.policies.lru import LRU
from kvstore.remote.options import RemoteOptions
from kvstore.tiers.base import Remote
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.host import HostTier
from kvstore.tiers.naive_remote import NaiveRemote, Shelf
from kvstore.tiers.redis import RedisTier

MIB = 1 << 20
TOKENS = ids(1, 64)  # four blocks of SMALL
_numbers = itertools.count()


def options(url: str = "redis://nobody", **changes: Any) -> RemoteOptions:
    """Options for a prefix that no other test has, and for machines that are busy with other tests."""
    given: dict[str, Any] = {"prefix": f"test{next(_numbers)}", "lookup": 5.0, "timeout": 5.0, **changes}
    return RemoteOptions(url, **given)


def redis_of(how: RemoteOptions) -> Remote:
    """The tier that options stand for."""
    return RedisTier(how.url, how.prefix, how.budget, how.key)


class GatedRemote:
    """A remote tier whose calls pass gates (see gates.py), are counted, and can be made to fail."""

    def __init__(self, tier: Remote) -> None:
        self.tier = tier
        self.calls: Counter[str] = Counter()
        self.fails = False
        self._lock = threading.Lock()
        self._gates: dict[str, Gate] = {}

    def gate(self, name: str, calls: int = 1, *, after: bool = False) -> Gate:
        """A gate for the next ``calls`` calls of this name."""
        self._gates[name] = Gate(calls, after, error=False)
        return self._gates[name]

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self.tier, name)
        if name not in ("find", "read", "refresh", "put", "drop", "scan"):
            return attribute

        def passed(*arguments: Any) -> Any:
            self.calls[name] += 1
            if self.fails:
                raise TierError("the test said so")
            with self._lock:
                gate = self._gates.get(name)
                if gate is not None:
                    gate.calls -= 1
                    if not gate.calls:
                        del self._gates[name]
            return attribute(*arguments) if gate is None else gate.pass_through(lambda: attribute(*arguments))

        return passed


@contextmanager
def sharing(
    remote: Remote | GatedRemote,
    how: RemoteOptions,
    path: Path | None = None,
    host: int = 8 * MIB,
    checked: bool = True,
    hot: Hot | None = None,
) -> Iterator[LocalStore]:
    """A store with this remote tier; its accounts must be right at the end."""
    disk = None if path is None else DiskTier(OsFiles(), str(path), 64 * MIB)
    store = LocalStore(HostTier(host), disk, LRU(), LRU(), hot=hot, remote=(cast(Remote, remote), how))
    try:
        yield store
        if checked:
            store.flush(PATIENCE)
            settled(store)
            assert recount(store) == []
            assert "failed_jobs" not in store.stats()["counters"]
    finally:
        store.close()


def settled(store: LocalStore) -> None:
    """Waits until nothing moves."""
    residency = store._residency
    with residency.lock:
        assert residency.changed.wait_for(lambda: not store._loader._fetches, PATIENCE)


def counters(store: LocalStore) -> dict[str, int]:
    """Those of the remote tier that are not 0."""
    said = store.stats()["counters"]
    return {name: count for name, count in said.items() if name.startswith("remote") and count}


def tiers(store: LocalStore, tokens: list[int], space: Namespace = NS, layout: Layout = SMALL) -> dict[str, int]:
    """Where a match finds tokens."""
    match = store.match(space, layout, [*tokens, 0])
    match.release()
    return {tier: count for tier, count in match.tokens_by_tier.items() if count}


class Fleet:
    """Hosts that share blocks through one kind of remote tier."""

    def __init__(self, kind: str, server: Server, stack: ExitStack) -> None:
        self._kind, self._server, self._stack = kind, server, stack
        self._shelf, self._prefix = Shelf(), options().prefix

    def remote(self, **changes: Any) -> tuple[Remote, Any]:
        how = options(self._server.url, **{"prefix": self._prefix, **changes})
        made = NaiveRemote(self._shelf, how.budget, how.key) if self._kind == "naive" else redis_of(how)
        return made, how

    def host(self, path: Path | None = None, host: int = 8 * MIB, **changes: Any) -> LocalStore:
        remote, how = self.remote(**changes)
        return self._stack.enter_context(sharing(remote, how, path, host))

    def there(self) -> dict[bytes, int]:
        """Blocks that are there, and of how many parts."""
        remote, _ = self.remote()
        seen: dict[bytes, int] = {}
        remote.scan(lambda some: seen.update({key: parts for key, parts, _ in some}), PATIENCE)
        remote.close()
        return seen

    def drop_parts(self, key: bytes) -> None:
        """As Redis does when memory is short: the header stays, its parts go."""
        if self._kind == "naive":
            for part in range(self.there()[key]):
                del self._shelf.parts[key, part]
            return
        with self._server.client() as client:
            client.unlink(*[name for name in self._names(key) if not name.endswith(b":h")])

    def damage(self, key: bytes) -> None:
        """Turns a bit in the last part."""
        part = self.there()[key] - 1
        if self._kind == "naive":
            data = self._shelf.parts[key, part]
            self._shelf.parts[key, part] = data[:9] + bytes([data[9] ^ 1]) + data[10:]
            return
        with self._server.client() as client:
            name = f"{self._prefix}:{{{key.hex()}}}:{part}"
            data = client.get(name)
            client.set(name, data[:9] + bytes([data[9] ^ 1]) + data[10:])

    def _names(self, key: bytes) -> list[bytes]:
        return [name for name in self._server.names() if key.hex().encode() in name]
