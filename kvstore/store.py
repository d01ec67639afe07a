"""The facade: match, load, draft, save, forget, stats. Engine-neutral, bytes in and bytes out."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kvstore.errors import BadInput, ForkError, StoreClosed
from kvstore.families import NONE
from kvstore.keys import TOKEN_BYTES, Namespace, token_bytes
from kvstore.known import Known
from kvstore.layout import Layout
from kvstore.lease import Lease
from kvstore.load import Load, Loader
from kvstore.match import Match
from kvstore.mover import Mover, Priority
from kvstore.policy import EvictionPolicy
from kvstore.residency import Residency
from kvstore.save import Draft, Saved, Saver
from kvstore.tiers.base import Problem, Tier
from kvstore.tiers.host import HostTier
from kvstore.writer import Writer

CLOSE_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Receipt:
    """What ``forget`` erased. ``deferred`` blocks are invisible already and are erased when their last lease ends."""

    blocks: int
    bytes: int
    deferred: int


class Store:
    """One cache. Every method may be called from any thread; none but ``close``, ``flush`` and ``wait`` blocks on I/O.

    Made by ``kvstore.open``; a context manager.
    """

    def __init__(
        self,
        host: HostTier,
        disk: Tier | None,
        host_policy: EvictionPolicy,
        disk_policy: EvictionPolicy,
        on_close: Callable[[], bool] = lambda: True,
    ) -> None:
        """``on_close`` says whether this call of ``close`` is the last of those who share the store."""
        self._residency = Residency(host, disk, host_policy, disk_policy)
        self._mover = Mover(on_error=lambda: self._residency.counters.add("failed_jobs"))
        self._loader = Loader(self._residency, self._mover)
        self._writer = Writer(self._residency, self._mover)
        self._saver = Saver(self._residency, self._writer)
        self._residency.erase_soon = self._erase_soon
        self._on_close = on_close
        self._pid = os.getpid()
        self._closed = False
        self._notes: dict[str, str] = {}  # ``remember`` without a disk
        self._known = Known(self.recall, self.remember)
        if disk is not None:
            self._residency.restore()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def usable(self) -> bool:
        """Whether this process may call it: opened here, not closed."""
        return not self._closed and os.getpid() == self._pid

    def _alive(self) -> Residency:
        if os.getpid() != self._pid:
            raise ForkError("this store was opened before a fork; call kvstore.open in the child")
        if self._closed:
            raise StoreClosed("the store is closed; open it again with kvstore.open")
        return self._residency

    # -- reading -----------------------------------------------------------------------------------------------

    def match(self, namespace: Namespace, layout: Layout, token_ids: object) -> Match:
        """The longest stored prefix of ``token_ids``, to the token; at least one token is left to compute.

        Takes leases on its blocks; moves nothing.
        """
        residency = self._alive()
        tokens = token_bytes(token_ids)
        limit = max(len(tokens) // TOKEN_BYTES - 1, 0)
        with residency.lock:
            residency.settle()
            now = residency.wall()
            index = residency.index
            found = index.find(namespace, layout, tokens, limit, now)
            blocks = [(number, layout.block_tokens) for number in found.blocks]
            if found.partial != NONE:
                blocks.append((found.partial, found.partial_tokens))
            numbers = [number for number, _ in blocks]
            residency.hold(numbers)
            residency.host_policy.touch(numbers)
            residency.disk_policy.touch(numbers)
            residents = residency.residents
            host = sum(used for number, used in blocks if number in residents)
            if residency.disk is not None:
                residency.disk.touch([index.sequence[n] for n in numbers if n not in residents], now)
            root = index.root(namespace.root)
            miss = self._known.explain(namespace, found.tokens, limit, index.families.size(root))
        residency.counters.add("matched_tokens", found.tokens)
        residency.counters.add("asked_tokens", limit)
        tiers = {"host": host, "disk": found.tokens - host}
        lease = Lease(numbers, residency.lease_ended)
        return Match(layout, blocks, lease, found.tokens, tiers, miss, tokens[: found.tokens * TOKEN_BYTES])

    def load(self, match: Match) -> Load:
        """Starts bringing what was matched to host memory, layer 0 first; the load takes over the match's lease."""
        self._alive()
        return self._loader.load(match)

    # -- writing -----------------------------------------------------------------------------------------------

    def draft(self, layout: Layout) -> Draft | None:
        """A private host slot to write one block into; None when memory is short, and the save ends before it."""
        drafts = self.drafts(layout, 1)
        return drafts[0] if drafts else None

    def drafts(self, layout: Layout, count: int) -> list[Draft]:
        """Up to ``count`` drafts, fewer when memory is short."""
        residency = self._alive()
        size = layout.full_slot_bytes
        with residency.lock:
            residency.settle()
            drafts = []
            for _ in range(count):
                address = residency.reserve_host(size)
                if address is None:
                    break
                drafts.append(Draft(residency, layout, address))
            residency.drafts += len(drafts)
        return drafts

    def save(
        self,
        namespace: Namespace,
        layout: Layout,
        token_ids: object,
        drafts: Mapping[int, Draft],
        *,
        owner: str = "",
        ttl: float | None = None,
        writer: str = "",
    ) -> Saved:
        """Publishes a chain's blocks; returns at once, visible to ``match`` from now on.

        ``token_ids``: all tokens of the chain whose KV exists. ``drafts``: by block number in the chain; all are taken
        over. A block that is stored already is not stored again; one that is neither stored nor drafted ends the save.
        ``owner``: whom the tokens belong to, for ``forget``. ``ttl``: seconds until they are no longer served.
        """
        self._alive()
        tokens = token_bytes(token_ids)
        if ttl is not None and not ttl > 0:
            raise BadInput(f"ttl must be a positive number of seconds, not {ttl}")
        for draft in drafts.values():
            if draft.layout != layout:
                raise BadInput("a draft has another layout than the save; ask store.draft for one of this layout")
        self._known.add(namespace)
        return self._saver.save(namespace, layout, tokens, drafts, owner, ttl, writer)

    # -- deleting ----------------------------------------------------------------------------------------------

    def forget(
        self, *, tenant: str | None = None, owner: str | None = None, older_than: float | None = None
    ) -> Receipt:
        """Erases blocks: bytes and token ids, in memory and on disk. Blocks must meet every condition given.

        ``older_than``: seconds since they were saved. Returns when the bytes on disk are gone, but for those that a
        lease still holds (``deferred``).
        """
        residency = self._alive()
        if tenant is None and owner is None and older_than is None:
            raise BadInput("forget needs a tenant, an owner or an age: an empty call would erase everything")
        blocks = size = deferred = 0
        with residency.lock:
            residency.settle()
            index = residency.index
            before = residency.wall() - older_than if older_than is not None else float("inf")
            wanted = {
                i
                for i, kind in enumerate(index.kinds)
                if (tenant is None or kind.tenant == tenant) and (owner is None or kind.owner == owner)
            }
            numbers = [n for n in index.numbers() if index.kind[n] in wanted and index.created[n] <= before]
            for number in sorted(numbers, key=index.sequence.__getitem__, reverse=True):
                if index.present(number):
                    blocks += 1
                    size += residency.payload(number)
                    deferred += residency.doom(number, erase=True)
        residency.counters.add("forgotten_blocks", blocks)
        self._erase()
        return Receipt(blocks, size, deferred)

    def _erase_soon(self) -> None:
        self._mover.submit(Priority.SAVE, (0,), self._erase)

    def _erase(self) -> None:
        residency = self._residency
        with residency.lock:
            doomed = residency.take_erasable()
        if not doomed or residency.disk is None:
            return
        residency.disk.erase([d.disk for d in doomed])
        with residency.lock:
            for d in doomed:
                residency.disk.free(d.disk)

    # -- the rest ----------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """Per tier ``bytes`` (payload), ``blocks``, ``capacity`` and ``used`` (all bytes taken); counters; leases."""
        residency = self._alive()
        with residency.lock:
            residency.settle()
            tiers = {
                "host": {
                    "bytes": residency.host_payload,
                    "blocks": len(residency.residents),
                    "capacity": residency.host.capacity,
                    "used": residency.host.used,
                }
            }
            if residency.disk is not None:
                tiers["disk"] = {
                    "bytes": residency.disk_payload,
                    "blocks": len(residency.disk_policy),
                    "capacity": residency.disk.capacity,
                    "used": residency.disk.used,
                }
            leases, drafts = len(residency.index.leases), residency.drafts
        counters = residency.counters.snapshot()
        return {"tiers": tiers, "counters": counters, "leases": leases, "drafts": drafts}

    def remember(self, name: str, value: str) -> None:
        """Keeps a small string beside the blocks (a checkpoint's digest), on disk where there is one."""
        disk = self._alive().disk
        if disk is None:
            self._notes[name] = value
        else:
            disk.remember(name, value)

    def recall(self, name: str) -> str | None:
        """What ``remember`` kept under ``name``."""
        disk = self._alive().disk
        return self._notes.get(name) if disk is None else disk.recall(name)

    def verify(self) -> list[Problem]:
        """Reads every block on disk and checks it; what is wrong with which."""
        disk = self._alive().disk
        return [] if disk is None else list(disk.verify())

    def flush(self, timeout: float | None = None) -> bool:
        """Writes everything that is only in memory; False when the time was not enough."""
        self._alive()
        return self._writer.flush(timeout)

    def close(self, timeout: float = CLOSE_SECONDS) -> None:
        """Flushes within ``timeout`` seconds, stops the threads, lets go of the directory. Again is no error."""
        if self._closed or os.getpid() != self._pid or not self._on_close():
            return
        self._writer.flush(timeout)
        self._closed = True
        self._mover.close()
        self._loader.abort()
        self._erase()
        if self._residency.disk is not None:
            self._residency.disk.close()
        self._residency.host.close()
