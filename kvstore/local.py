"""The store of this process: the parts behind the facade, and their beginning and end."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvstore.admission import Admission
from kvstore.census import census
from kvstore.composition import Composition
from kvstore.discovery import Discoveries
from kvstore.erasure import Eraser, Receipt
from kvstore.errors import BadInput, ForkError, StoreClosed, TierError
from kvstore.finder import Finder
from kvstore.hot import Hot
from kvstore.job import Answer, Job
from kvstore.keeper import Demoted, Keeper, Pinned, Retained, TierName
from kvstore.keys import Namespace, token_bytes
from kvstore.known import Known
from kvstore.layout import Layout
from kvstore.load import Load
from kvstore.loader import Loader
from kvstore.match import Match
from kvstore.mover import Mover
from kvstore.notes import Notes
from kvstore.policy import EvictionPolicy
from kvstore.prefetch import Prefetcher
from kvstore.prospect import Prospect
from kvstore.residency import Residency
from kvstore.restore import restore
from kvstore.save import Draft, Saved, Saver
from kvstore.store import CLOSE_SECONDS, Store
from kvstore.tensors.streams import ThreadStream
from kvstore.tiers.base import Problem, Tier
from kvstore.tiers.host import HostTier
from kvstore.writer import Writer

log = logging.getLogger("kvstore")

LEARNED = "policies/host"  # the note that keeps what the policy has learned; that of the disk shares it


class LocalStore(Store):
    """The parts of a store in this process, and what each verb asks of them."""

    def __init__(
        self,
        host: HostTier,
        disk: Tier | None,
        host_policy: EvictionPolicy,
        disk_policy: EvictionPolicy,
        on_close: Callable[[], bool] = lambda: True,
        closed: Callable[[], None] = lambda: None,
        hot: Hot | None = None,
    ) -> None:
        """``on_close`` says whether this call of ``close`` is the last of those who share the store; ``closed`` is
        called when the last has let go of everything."""
        self._residency = Residency(host, disk, host_policy, disk_policy, hot)
        self._mover = Mover(on_error=lambda: self._residency.counters.add("failed_jobs"))
        self._loader = Loader(self._residency, self._mover)
        self._prefetcher = Prefetcher(self._residency, self._loader, self._mover)
        self._keeper = Keeper(self._residency, self._loader, self._prefetcher.uploader)
        self._writer = Writer(self._residency, self._mover)
        self._admission = Admission(self._residency, self._writer)
        self._saver = Saver(self._residency, self._writer)
        self._eraser = Eraser(self._residency, self._mover)
        self._on_close, self._when_closed = on_close, closed
        self._pid, self._closed = os.getpid(), False
        self._notes = Notes(disk)
        self._known = Known(self._notes.recall, self._notes.remember)
        self._finder = Finder(self._residency, self._known)
        self._discoveries = Discoveries(self._residency, self._saver.listeners)
        if disk is not None:
            restore(self._residency, disk)
            self._residency.host_policy.learn(self._notes.recall(LEARNED) or "")

    def share(self) -> LocalStore:
        other = copy.copy(self)
        other._closed = False
        return other

    def _alive(self) -> Residency:
        if os.getpid() != self._pid:
            raise ForkError("this store was opened before a fork; call kvstore.open in the child")
        if self._closed:
            raise StoreClosed("the store is closed; open it again with kvstore.open")
        return self._residency

    def match(
        self,
        namespace: Namespace,
        layout: Layout,
        token_ids: object,
        *,
        root: bytes | None = None,
        first: int = 0,
        whole: bool = False,
    ) -> Match:
        self._alive()
        return self._finder.match(namespace, layout, token_bytes(token_ids), root or namespace.root, first, whole)

    def discover(self, namespace: Namespace, layout: Layout, token_ids: object, minimum: int) -> Composition:
        tokens = token_bytes(token_ids)
        match = self.match(namespace, layout, tokens, whole=True)
        match.release()
        return self._discoveries.of(namespace, layout, minimum).compose(tokens, match.tokens)

    def prospect(self, matches: Sequence[Match], device: bool = False) -> Prospect:
        self._alive()
        return self._loader.prospect(matches, device)

    def load(self, match: Match, device: bool = False) -> Load:
        self._alive()
        return self._loader.load(match, device)

    def schedule(self, waiting: Sequence[Job]) -> list[Answer]:
        self._alive()
        return self._prefetcher.schedule(waiting)

    def expect(self, layout: Layout) -> None:
        residency = self._alive()
        with residency.lock:
            residency.host.expect(layout.full_slot_bytes)

    def worker(self) -> ThreadStream:
        self._alive()
        return self._loader.worker()

    def drafts(self, layout: Layout, count: int) -> list[Draft]:
        self._alive()
        return self._saver.drafts(layout, count)

    def save(
        self,
        namespace: Namespace,
        layout: Layout,
        token_ids: object,
        drafts: Mapping[int, Draft],
        *,
        root: bytes | None = None,
        owner: str = "",
        ttl: float | None = None,
        writer: str = "",
    ) -> Saved:
        self._alive()
        tokens = token_bytes(token_ids)
        if ttl is not None and not ttl > 0:
            raise BadInput(f"ttl must be a positive number of seconds, not {ttl}")
        self._saver.check(layout, drafts)
        self._known.add(namespace)
        return self._saver.save(namespace, root or namespace.root, layout, tokens, drafts, owner, ttl, writer)

    def pin(self, match: Match, tier: TierName = "host", *, seconds: float) -> Pinned:
        self._alive()
        return self._keeper.pin(match, tier, seconds)

    def retain(self, match: Match, seconds: float) -> Retained:
        self._alive()
        return self._keeper.retain(match, seconds)

    def demote(self, match: Match) -> Demoted:
        self._alive()
        return self._keeper.demote(match)

    def forget(
        self,
        *,
        tenant: str | None = None,
        owner: str | None = None,
        older_than: float | None = None,
        match: Match | None = None,
    ) -> Receipt:
        self._alive()
        return self._eraser.forget(tenant, owner, older_than, match)

    def stats(self) -> dict[str, Any]:
        return census(self._alive(), self._loader.gauges())

    def remember(self, name: str, value: str) -> None:
        self._alive()
        self._notes.remember(name, value)

    def recall(self, name: str) -> str | None:
        self._alive()
        return self._notes.recall(name)

    def verify(self) -> list[Problem]:
        disk = self._alive().disk
        return [] if disk is None else list(disk.verify())

    def flush(self, timeout: float | None = None) -> bool:
        self._alive()
        return self._writer.flush(timeout)

    def close(self, timeout: float = CLOSE_SECONDS) -> None:
        if os.getpid() != self._pid:
            return
        residency = self._residency
        with residency.lock:
            if self._closed:
                return
            self._closed = True
        if not self._on_close():
            return
        try:
            self._writer.flush(timeout)
            with residency.lock:
                residency.closed = True
            self._mover.close()
            self._loader.close()
            self._writer.abort()
            with residency.lock:
                residency.settle()
                learned = residency.host_policy.state()
            self._notes.remember(LEARNED, learned)
            self._eraser.erase()
            if residency.disk is not None:
                residency.disk.close()
        except TierError as error:
            log.warning("the disk tier could not be closed well: %s", error)
        finally:
            if residency.hot is not None:
                residency.hot.tier.close()
            with residency.lock:
                residency.host.close()
            self._when_closed()
