"""Forgets blocks in the remote tier: what is erased here is erased there, now or as soon as it answers."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from kvstore.block import Header, decode_header
from kvstore.errors import Corrupt, TierError
from kvstore.metrics import Counters
from kvstore.remote.block import copy_bytes
from kvstore.tiers.base import Copy, Remote
from kvstore.tiers.seal import Envelope

log = logging.getLogger("kvstore")

SECONDS = 10.0  # for one look through all that is there, at most


@dataclass(frozen=True)
class Wish:
    """What is to be forgotten: blocks that meet all of it. ``before``: made until then (Unix seconds). ``keys``: these,
    and what stands behind them."""

    tenant: str | None
    owner: str | None
    before: float
    keys: frozenset[bytes] | None = None

    def meets(self, header: Header) -> bool:
        """All of it but ``keys``."""
        same = self.tenant in (None, header.tenant) and self.owner in (None, header.owner)
        return same and header.created <= self.before


class Withdrawal:
    """One per store with a remote tier. What fails is kept, and tried again with what is wished next. Any thread."""

    def __init__(self, remote: Remote, counters: Counters) -> None:
        self._remote, self._counters = remote, counters
        self._turn = threading.Lock()  # one look at a time; guards the wishes
        self._wishes: list[Wish] = []  # replaced in one step, for whoever reads it without the turn

    @property
    def pending(self) -> int:
        """Wishes that have failed so far."""
        return len(self._wishes)

    def hides(self, header: Header) -> bool:
        """Whether a block is to be forgotten, and so not to be found until it is. One that stands behind such a block
        may pass: it is not reached."""
        for wish in self._wishes:
            named = wish.keys is None or header.key in wish.keys or header.parent in wish.keys
            if named and wish.meets(header):
                return True
        return False

    def add(self, wish: Wish) -> None:
        """Notes what is to be forgotten, for the next ``run``, and hides it until then."""
        with self._turn:
            self._wishes = [*self._wishes, wish]

    def run(self, seconds: float = SECONDS) -> int:
        """Destroys what was wished for; how many blocks were there. What the time is not enough for stays pending."""
        with self._turn:
            if not self._wishes:
                return 0
            look = _Look(self._wishes)
            deadline, gone = time.monotonic() + seconds, 0
            try:
                self._remote.scan(look, seconds)
                doomed = look.doomed()
                for start in range(0, len(doomed), 64):
                    left = deadline - time.monotonic()
                    gone += self._remote.drop(doomed[start : start + 64], max(left, 0.001))
            except TierError as error:
                log.warning("forgotten blocks are not yet erased from the remote tier: %s", error)
                self._counters.add("failed_erases")
            else:
                self._wishes = []
        if gone:
            self._counters.add("remote_erased_blocks", gone)
        return gone


class _Look:
    """Takes down all that might have to go while the remote tier is scanned."""

    def __init__(self, wishes: Sequence[Wish]) -> None:
        self._wishes = wishes
        self._going: dict[bytes, Copy] = {}
        self._all: list[tuple[bytes, bytes, Copy, tuple[bool, ...]]] = []  # key, parent, and which wishes it may meet

    def __call__(self, found: Sequence[tuple[bytes, int, Envelope | None]]) -> None:
        """Some of what is there."""
        for key, parts, envelope in found:
            try:
                header = None if envelope is None else decode_header(envelope.header)
            except Corrupt:
                header = None
            if header is None or envelope is None:
                self._going[key] = Copy(key, parts, 0, 0.0)  # nobody can read it, nor say whose it is
                continue
            copy = Copy(key, max(parts, envelope.parts), copy_bytes(envelope.header, header.layout), 0.0)
            meets = tuple(wish.meets(header) for wish in self._wishes)
            if any(fits and wish.keys is None for wish, fits in zip(self._wishes, meets, strict=True)):
                self._going[key] = copy
            elif any(wish.keys is not None for wish in self._wishes):
                self._all.append((key, header.parent, copy, meets))

    def doomed(self) -> list[Copy]:
        """What is to go, once all was seen."""
        for at, wish in enumerate(self._wishes):
            reached, before = set(wish.keys or ()), -1
            while before != len(reached):  # a round reaches what stands behind the last one's
                before = len(reached)
                reached.update(key for key, parent, _, _ in self._all if parent in reached)
            self._going |= {key: copy for key, _, copy, meets in self._all if key in reached and meets[at]}
        return list(self._going.values())
