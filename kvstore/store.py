"""The facade: match, load, draft, save, forget, stats. Engine-neutral, bytes in and bytes out.

``kvstore.open`` makes one in this process (``local.py``), ``kvstore.connect`` one that a daemon holds for several.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Self

from kvstore.composition import Composition
from kvstore.erasure import Receipt
from kvstore.job import Answer, Job
from kvstore.keeper import Demoted, Pinned, Retained, TierName
from kvstore.keys import Namespace
from kvstore.kinds import PRE
from kvstore.layout import Layout, Shard
from kvstore.load import Load
from kvstore.match import Match
from kvstore.prospect import Prospect
from kvstore.save import Draft, Saved
from kvstore.segments import Segment
from kvstore.tensors.streams import ThreadStream
from kvstore.tiers.base import Problem

CLOSE_SECONDS = 30.0


class Store(ABC):
    """One cache, made by ``kvstore.open`` or ``kvstore.connect``; a context manager.

    Every method may be called from any thread; none but ``close``, ``flush`` and ``wait`` blocks on I/O."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def draft(self, layout: Layout) -> Draft | None:
        """A private host slot to write one block into; None when memory is short, and the save ends before it."""
        drafts = self.drafts(layout, 1)
        return drafts[0] if drafts else None

    @abstractmethod
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
        With ``keys.APART`` as the root, each whole block is a chain of its own: all that are stored are matched, in
        order, and ``lacking`` names the others.
        """

    @abstractmethod
    def discover(self, namespace: Namespace, layout: Layout, token_ids: object, minimum: int) -> Composition:
        """A prompt with every stored run of at least ``minimum`` tokens, wherever it stands, as a placement.

        What is stored of it from its start comes first. The first call looks through all blocks, which takes a while.
        Raises ``BadInput`` for a minimum that is too small."""

    @abstractmethod
    def prospect(self, matches: Sequence[Match], device: bool = False) -> Prospect:
        """What loading these matches, of one layout, would take now. Moves nothing; a microsecond for a block."""

    @abstractmethod
    def load(self, match: Match, device: bool = False) -> Load:
        """Starts bringing what was matched to host memory, layer 0 first; the load takes over the match's lease.

        With ``device``, for an engine whose caches are on the device tier's device: what is there stays there, and the
        rest gets slots there, as far as there is room, which the caller fills (``Place.slot``)."""

    @abstractmethod
    def schedule(self, waiting: Sequence[Job]) -> list[Answer]:
        """Hints: the whole queue of waiting jobs, the next one first, in every call anew. What they will read is kept,
        and brought from disk ahead, nearest first, as far as there is room; the call waits for no read. Jobs that are
        not in it any more have started, or never will. Takes microseconds for a block. Raises ``BadInput``."""

    @abstractmethod
    def expect(self, layout: Layout) -> None:
        """An engine with caches of this layout is there: memory for its blocks is made ready beside it, from now on."""

    @abstractmethod
    def worker(self) -> ThreadStream:
        """A thread of the store's for work that adapters want done beside the engine's; ends with the store."""

    @abstractmethod
    def drafts(self, layout: Layout, count: int) -> list[Draft]:
        """Up to ``count`` drafts, fewer when memory is short."""

    @abstractmethod
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
        """Publishes a chain's blocks; returns at once, visible to ``match`` from now on.

        ``token_ids``: all tokens of the chain whose KV exists. ``drafts``: by block number in the chain; all are taken
        over. A block that is stored already is not stored again; one that is neither stored nor drafted ends the save.
        ``root``: the key that the chain starts from (``Context.root``), by default that of chains behind nothing; with
        ``keys.APART`` each block is a chain of its own, whose end does not end the others.
        ``owner``: whom the tokens belong to, for ``forget``. ``ttl``: seconds until they are no longer served.
        ``writer``: the engine and its build. ``form``: how keys stand in the drafts, "pre" (before rotation) or
        "rotated": turned for the positions of their tokens. The latter only for chains that start at position 0, behind
        nothing, so without a ``root``. Blocks of one chain may differ in it; what is stored stays as it is.
        ``shard``: of several workers, what this one has; drafts have its layout. A block is visible once all its heads
        have come, within half a minute, whoever saves the last.
        """

    @abstractmethod
    def pin(self, match: Match, tier: TierName = "host", *, seconds: float) -> Pinned:
        """Keeps what was matched, and what stands before it, in a tier until ``seconds`` after its last use by a match,
        ten times as long at most, and at most in half of the tier, leading tokens first.

        "host": what is only on disk is read, behind all that loads wait for. "disk": what is only in memory is written.
        "device": what is in memory is copied, and stays in the last tier, too. A pin needs no handle; what supersedes a
        block takes over its pins; they end with the store."""

    @abstractmethod
    def retain(self, match: Match, seconds: float) -> Retained:
        """Keeps what was matched, and what stands before it, in the store for ``seconds``: on disk where there is one
        (what is only in memory is written), or else in memory. A quarter of that tier at most, leading tokens first."""

    @abstractmethod
    def demote(self, match: Match) -> Demoted:
        """What was matched leaves memory and device first: what is on disk and not being read at once, the rest when it
        is written. Pins there end, and so does the match. Without a disk it is what goes first when room is needed."""

    @abstractmethod
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

    @abstractmethod
    def stats(self) -> dict[str, Any]:
        """Tiers, gauges, counters and leases, in numbers; see ``census``."""

    @abstractmethod
    def segments(self, limit: int = 100, tenant: str | None = None) -> list[Segment]:
        """What is stored, of one tenant or of all: up to ``limit`` stretches of blocks that are used together, those
        that served most tokens first. A microsecond or two for a block, and others get the store's lock meanwhile.
        Raises ``BadInput``."""

    @abstractmethod
    def saved(self, seconds: float) -> None:
        """An engine says how many seconds earlier it was done with a prefill for having loaded what it did. They are
        added up in ``stats``, as ``saved_prefill_seconds``. Raises ``BadInput``."""

    @abstractmethod
    def remember(self, name: str, value: str) -> None:
        """Keeps a small string beside the blocks (a checkpoint's digest), on disk where there is one."""

    @abstractmethod
    def recall(self, name: str) -> str | None:
        """What ``remember`` kept under ``name``."""

    @abstractmethod
    def verify(self) -> list[Problem]:
        """Reads every block on disk and checks it; what is wrong with which."""

    @abstractmethod
    def flush(self, timeout: float | None = None) -> bool:
        """Writes everything that is only in memory; False when the time was not enough."""

    @abstractmethod
    def close(self, timeout: float = CLOSE_SECONDS) -> None:
        """Flushes within ``timeout`` seconds, stops the threads, lets go of the directory. Again is no error."""
