"""The facade: match, load, draft, save, forget, stats. Engine-neutral, bytes in and bytes out."""

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
from kvstore.tensors.streams import ThreadStream
from kvstore.tiers.base import Problem, Tier
from kvstore.tiers.host import HostTier
from kvstore.writer import Writer

log = logging.getLogger("kvstore")

CLOSE_SECONDS = 30.0
LEARNED = "policies/host"  # the note that keeps what the policy has learned; that of the disk shares it


class Store:
    """One cache, made by ``kvstore.open``; a context manager.

    Every method may be called from any thread; none but ``close``, ``flush`` and ``wait`` blocks on I/O."""

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

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def share(self) -> Store:
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

    # -- reading -----------------------------------------------------------------------------------------------

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
        """The longest stored prefix of ``token_ids``, to the token; at least one is left to compute, but if ``whole``.

        ``root``: the key that the chain starts from (``Context.root``), by default that of chains behind nothing.
        ``first``: the first token that is wanted; blocks before it are left out. Takes leases; moves nothing.
        """
        self._alive()
        return self._finder.match(namespace, layout, token_bytes(token_ids), root or namespace.root, first, whole)

    def discover(self, namespace: Namespace, layout: Layout, token_ids: object, minimum: int) -> Composition:
        """A prompt with every stored run of at least ``minimum`` tokens, wherever it stands, as a placement.

        What is stored of it from its start comes first. The first call looks through all blocks, which takes a while.
        Raises ``BadInput`` for a minimum that is too small."""
        tokens = token_bytes(token_ids)
        match = self.match(namespace, layout, tokens, whole=True)
        match.release()
        return self._discoveries.of(namespace, layout, minimum).compose(tokens, match.tokens)

    def prospect(self, matches: Sequence[Match], device: bool = False) -> Prospect:
        """What loading these matches, of one layout, would take now. Moves nothing; a microsecond for a block."""
        self._alive()
        return self._loader.prospect(matches, device)

    def load(self, match: Match, device: bool = False) -> Load:
        """Starts bringing what was matched to host memory, layer 0 first; the load takes over the match's lease.

        With ``device``, for an engine whose caches are on the device tier's device: what is there stays there, and the
        rest gets slots there, as far as there is room, which the caller fills (``Place.slot``)."""
        self._alive()
        return self._loader.load(match, device)

    def schedule(self, waiting: Sequence[Job]) -> list[Answer]:
        """Hints: the whole queue of waiting jobs, the next one first, in every call anew. What they will read is kept,
        and brought from disk ahead, nearest first, as far as there is room; the call waits for no read. Jobs that are
        not in it any more have started, or never will. Takes microseconds for a block. Raises ``BadInput``."""
        self._alive()
        return self._prefetcher.schedule(waiting)

    def expect(self, layout: Layout) -> None:
        """An engine with caches of this layout is there: memory for its blocks is made ready beside it, from now on."""
        residency = self._alive()
        with residency.lock:
            residency.host.expect(layout.full_slot_bytes)

    def worker(self) -> ThreadStream:
        """A thread of the store's for work that adapters want done beside the engine's; ends with the store."""
        self._alive()
        return self._loader.worker()

    # -- writing -----------------------------------------------------------------------------------------------

    def draft(self, layout: Layout) -> Draft | None:
        """A private host slot to write one block into; None when memory is short, and the save ends before it."""
        drafts = self.drafts(layout, 1)
        return drafts[0] if drafts else None

    def drafts(self, layout: Layout, count: int) -> list[Draft]:
        """Up to ``count`` drafts, fewer when memory is short."""
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
        """Publishes a chain's blocks; returns at once, visible to ``match`` from now on.

        ``token_ids``: all tokens of the chain whose KV exists. ``drafts``: by block number in the chain; all are taken
        over. A block that is stored already is not stored again; one that is neither stored nor drafted ends the save.
        ``root``: the key that the chain starts from (``Context.root``), by default that of chains behind nothing.
        ``owner``: whom the tokens belong to, for ``forget``. ``ttl``: seconds until they are no longer served.
        """
        self._alive()
        tokens = token_bytes(token_ids)
        if ttl is not None and not ttl > 0:
            raise BadInput(f"ttl must be a positive number of seconds, not {ttl}")
        self._saver.check(layout, drafts)
        self._known.add(namespace)
        return self._saver.save(namespace, root or namespace.root, layout, tokens, drafts, owner, ttl, writer)

    # -- what stays and what goes ------------------------------------------------------------------------------

    def pin(self, match: Match, tier: TierName = "host", *, seconds: float) -> Pinned:
        """Keeps what was matched, and what stands before it, in a tier until ``seconds`` after its last use by a match,
        ten times as long at most, and at most in half of the tier, leading tokens first.

        "host": what is only on disk is read, behind all that loads wait for. "disk": what is only in memory is written.
        "device": what is in memory is copied, and stays in the last tier, too. A pin needs no handle; what supersedes a
        block takes over its pins; they end with the store."""
        self._alive()
        return self._keeper.pin(match, tier, seconds)

    def retain(self, match: Match, seconds: float) -> Retained:
        """Keeps what was matched, and what stands before it, in the store for ``seconds``: on disk where there is one
        (what is only in memory is written), or else in memory. A quarter of that tier at most, leading tokens first."""
        self._alive()
        return self._keeper.retain(match, seconds)

    def demote(self, match: Match) -> Demoted:
        """What was matched leaves memory and device first: what is on disk and not being read at once, the rest when it
        is written. Pins there end, and so does the match. Without a disk it is what goes first when room is needed."""
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
        """Erases blocks: bytes and token ids, in memory and on disk. Blocks must meet every condition given.

        ``older_than``: seconds since they were saved. ``match``: whole blocks of what it found, and all that stands
        behind, which nobody would find any more; the match ends. Returns when the bytes on disk are gone, but for those
        that a lease still holds (``deferred``)."""
        self._alive()
        return self._eraser.forget(tenant, owner, older_than, match)

    # -- the rest ----------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """Tiers, gauges, counters and leases, in numbers; see ``census``."""
        return census(self._alive(), self._loader.gauges())

    def remember(self, name: str, value: str) -> None:
        """Keeps a small string beside the blocks (a checkpoint's digest), on disk where there is one."""
        self._alive()
        self._notes.remember(name, value)

    def recall(self, name: str) -> str | None:
        """What ``remember`` kept under ``name``."""
        self._alive()
        return self._notes.recall(name)

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
