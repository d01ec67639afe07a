"""The store of this process: the parts behind the facade, and their beginning and end."""

from __future__ import annotations

import copy
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from kvstore import budget
from kvstore.admission import Admission
from kvstore.census import census
from kvstore.composition import Composition
from kvstore.discovery import Discoveries
from kvstore.erasure import Eraser, Receipt
from kvstore.errors import ForkError, StoreClosed, TierError
from kvstore.finder import Finder
from kvstore.hot import Hot
from kvstore.job import Answer, Job
from kvstore.joiner import Joiner
from kvstore.keeper import Demoted, Keeper, Pinned, Retained, TierName
from kvstore.keys import Namespace, token_bytes
from kvstore.kinds import PRE, Origin, check_form, check_ttl
from kvstore.known import Known
from kvstore.layout import Layout, Shard
from kvstore.load import Load
from kvstore.loader import Loader
from kvstore.match import Match
from kvstore.mover import Mover
from kvstore.notes import Notes
from kvstore.policy import EvictionPolicy
from kvstore.prefetch import Prefetcher
from kvstore.prospect import Prospect
from kvstore.remote.options import RemoteOptions
from kvstore.remote.tier import RemoteTier
from kvstore.residency import Residency
from kvstore.restore import restore
from kvstore.save import Draft, Saved, Saver, check_drafts
from kvstore.segments import Segment, segment_match, segments
from kvstore.store import CLOSE_SECONDS, Store
from kvstore.tensors.streams import ThreadStream
from kvstore.tiers.base import Problem, Remote, Tier
from kvstore.tiers.host import HostTier
from kvstore.writer import Writer

log = logging.getLogger("kvstore")

RESIZE_SECONDS = 10.0
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
        remote: tuple[Remote, RemoteOptions] | None = None,
    ) -> None:
        """``on_close`` says whether this call of ``close`` is the last of those who share the store; ``closed`` is
        called when the last has let go of everything."""
        self._residency = Residency(host, disk, host_policy, disk_policy, hot)
        self._mover = Mover(on_error=lambda: self._residency.counters.add("failed_jobs"))
        self._remote = None if remote is None else RemoteTier(self._residency, *remote)
        self._loader = Loader(self._residency, self._mover, self._remote)
        self._prefetcher = Prefetcher(self._residency, self._loader, self._mover)
        self._keeper = Keeper(self._residency, self._loader, self._prefetcher.uploader)
        self._writer = Writer(self._residency, self._mover)
        self._admission = Admission(self._residency, self._writer)
        self._saver = Saver(self._residency, self._writer)
        self._joiner = Joiner(self._residency, self._saver)
        self._eraser = Eraser(self._residency, self._mover, self._remote)
        self._on_close, self._when_closed = on_close, closed
        self._pid, self._closed = os.getpid(), False
        self._notes = Notes(disk)
        self._known = Known(self._notes.recall, self._notes.remember)
        self._finder = Finder(self._residency, self._known, self._remote)
        self._discoveries = Discoveries(self._residency, self._saver.listeners)
        if disk is not None:
            restore(self._residency, disk)
            self._residency.host_policy.learn(self._notes.recall(LEARNED) or "")

    def share(self) -> LocalStore:
        """One more handle on this store, closed apart: what they share closes with the last."""
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
        self._joiner.trim()
        return self._saver.drafts(layout, count)

    def lacking(
        self, namespace: Namespace, layout: Layout, token_ids: object, numbers: Sequence[int], root: bytes | None = None
    ) -> list[int]:
        """Of these blocks of a chain, by their number in it, those that are not in memory: what a save needs."""
        self._alive()
        return self._saver.lacking(namespace, root or namespace.root, layout, token_bytes(token_ids), numbers)

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
        form: str = PRE,
        shard: Shard | None = None,
    ) -> Saved:
        self._alive()
        tokens = token_bytes(token_ids)
        check_form(form, namespace, root)
        check_ttl(ttl)
        check_drafts(layout if shard is None else shard.layout, drafts, lambda draft: draft.usable(self._residency))
        self._known.add(namespace)
        root, origin = root or namespace.root, Origin(form, writer)
        publish = partial(self._saver.save, namespace, root, layout, tokens, owner=owner, ttl=ttl, origin=origin)
        if shard is None:
            return publish(drafts)
        return self._joiner.save(namespace, root, layout, tokens, drafts, shard, publish)

    def join(
        self,
        namespace: Namespace,
        layout: Layout,
        token_ids: object,
        parts: Mapping[int, memoryview],
        shard: Shard,
        root: bytes | None = None,
    ) -> None:
        """Copies in payloads of a worker's shard, by block number; ``save`` with the shard publishes them."""
        self._alive()
        self._joiner.join(namespace, root or namespace.root, layout, token_bytes(token_ids), parts, shard)

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

    def segment(self, id: str) -> Match:
        """A segment by the leading digits of its id, as a match of its own blocks, which does not tell their token ids:
        to pin, retain, demote or forget it. Raises ``BadInput`` when there is none, or more than one."""
        return segment_match(self._alive(), id)

    def resize(self, host: int, timeout: float = RESIZE_SECONDS) -> int:
        """Gives host memory another budget, in bytes; returns the bytes that it takes then. They are more than the
        budget only as long as leases, drafts or writes hold what has to go; meanwhile no more memory is taken. Returns
        within ``timeout`` seconds, and what is left goes later. Raises ``BadInput`` for a budget that cannot be had, or
        cannot hold what is pinned."""
        return budget.resize(self._alive(), host, timeout)

    def stats(self) -> dict[str, Any]:
        budget.settle(self._alive())
        return census(self._alive(), self._loader.gauges(), self._remote)

    def segments(self, limit: int = 100, tenant: str | None = None) -> list[Segment]:
        return segments(self._alive(), limit, tenant)

    def saved(self, seconds: float) -> None:
        residency = self._alive()
        with residency.lock:
            residency.uses.saved(seconds)

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
        return self._flush(timeout)

    def _flush(self, timeout: float | None) -> bool:
        deadline = None if timeout is None else time.monotonic() + timeout
        written = self._writer.flush(timeout)
        if self._remote is None:
            return written
        return self._remote.flush(None if deadline is None else max(deadline - time.monotonic(), 0.0)) and written

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
            self._flush(timeout)
            with residency.lock:
                residency.closed = True
            self._mover.close()
            if self._remote is not None:
                self._remote.close()
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
