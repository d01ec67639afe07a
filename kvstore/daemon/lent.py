"""Matches, loads and saves of a client: what the daemon lends, and what looks like any other store's."""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvstore.daemon.connection import Connection
from kvstore.daemon.held import Held, Staging, Ticket
from kvstore.daemon.packed import match_fields
from kvstore.daemon.pinning import Pinning
from kvstore.errors import KVStoreError, TierError, Unreachable
from kvstore.fetch import Fetch
from kvstore.hot import Hold
from kvstore.keys import TOKEN_BYTES
from kvstore.kinds import Origin
from kvstore.layout import Layout
from kvstore.lease import Lease
from kvstore.load import Load, Source
from kvstore.match import Match, Miss, without
from kvstore.residency import Resident
from kvstore.save import Draft, Saved
from kvstore.tiers.slab import SLOT_BITS
from kvstore.writer import Durable

Given = list[tuple[int, int, bool]]  # drafts of a save: block, number, whether it was filled in one go
NOTHING = Durable(0, 0, 0)


class LentMatch(Match):
    """A match that a daemon holds."""

    connection: Connection | None = None
    number = 0

    @classmethod
    def of(cls, connection: Connection, layout: Layout, tokens: bytes, packed: Any) -> LentMatch:
        """From a daemon's answer."""
        number, count, skipped, blocks, tiers, miss, lacking, origins = match_fields(packed)
        lease = Lease(Held(number, len(blocks)), connection.lease_ended) if number else Lease((), _nothing)
        there = without(tokens, layout.block_tokens * TOKEN_BYTES, lacking)
        held = there[skipped * TOKEN_BYTES : count * TOKEN_BYTES]
        match = cls(layout, blocks, lease, count, tiers, miss, held, skipped, lacking, origins)
        match.connection, match.number = connection, number
        return match

    def cut(self, tokens: int) -> None:
        super().cut(tokens)
        if self.connection is not None and self.number:
            with contextlib.suppress(Unreachable):
                self.connection.channel.tell("cut", self.number, len(self.blocks))

    @classmethod
    def missing(cls, layout: Layout, why: str) -> LentMatch:
        """Nothing is found, because the daemon cannot be asked."""
        return cls(layout, [], Lease((), _nothing), 0, [], Miss("refused", 0, why), b"")


class LentLoad(Load):
    """A load of blocks in a daemon's arenas. The daemon alone writes there, and nothing into blocks that are leased; so
    what was copied while the session was alive is what it should be."""

    lent = True
    _connection: Connection | None = None
    _sums: Callable[[], list[bytes | None]] | None = None

    @classmethod
    def of(
        cls,
        connection: Connection,
        match: LentMatch,
        name: int,
        packed: Any,
        sums: Callable[[], list[bytes | None]],
    ) -> LentLoad:
        """From a daemon's answer. ``sums`` asks for the checksums of its blocks."""
        again = name != match.number
        lease = Lease(Held(name, len(packed)), connection.lease_ended) if again else match.lease
        match.loaded = True
        sources: list[Source] = []
        try:
            for place, source in enumerate(packed):
                sources.append(_source(connection, match, name, place, source))
        except TierError:
            pass  # the arena could not be mapped: the load ends before it
        load = cls(match, sources, connection, Hold(lease, []))
        load._connection, load._sums = connection, sums
        return load

    @classmethod
    def empty(cls, match: Match) -> LentLoad:
        """A load of nothing."""
        match.loaded = True
        return cls(match, [], _NOWHERE, Hold(match.lease, []))

    def intact(self) -> bool:
        """Whether the session, and with it the lease, was alive until now."""
        return self._connection is None or self._connection.alive

    def read_into(self, buffer: memoryview, timeout: float | None = None, check: bool = False) -> int:
        if check and self._sums is not None and self.sources:
            for source, data in zip(self.sources, self._sums(), strict=False):
                held = source.held.resident if isinstance(source.held, Fetch) else source.held
                if held is not None and data is not None:
                    held.checksums = array("Q", data)
        return super().read_into(buffer, timeout, check)

    def good_tokens(self, layer: int = 0) -> int:
        return super().good_tokens(layer) if self.intact() else 0

    def wait(self, layer: int, timeout: float | None = None) -> bool:
        return super().wait(layer, timeout) and self.intact()


class _Nowhere:
    """The home of loads of nothing."""

    hot = None

    def load_ended(self, hold: Hold) -> None:
        hold.lease.release()


_NOWHERE = _Nowhere()


def _nothing(_: object) -> None:
    """The end of a lease on nothing."""


def origin_of(match: Match, place: int, form: str) -> Origin:
    """That of a block of a load, whose form the daemon tells anew: it may be another block by then."""
    return match.origins[place]._replace(form=form)


def _source(connection: Connection, match: Match, name: int, place: int, packed: Any) -> Source:
    number, tokens, address, offset, stride, form, state = packed
    arena, layout = connection.arena(False, address >> SLOT_BITS), match.layout
    size = layout.slot_bytes(stride)
    resident = Resident(address, layout, stride, layout.token_payload * tokens, clean=True)
    view = arena.view[offset : offset + size]
    held: Resident | Fetch = resident
    if state is not None:
        held = Fetch(number, resident, view, address, layout.header_bytes)
        ready = -1 if isinstance(state, int) else int.from_bytes(state, "little")
        if ready < 0:
            held.fail()
        else:
            held.catch_up(ready)
            connection.watch(name, place, held)
    return Source(number, tokens, held, view, None, arena.base + offset, origin_of(match, place, form))


class LentDraft(Draft):
    """A draft in this client's staging area. What is filled in one go is copied by the daemon at once, while the next
    is filled; what is written piece by piece is copied when it is saved."""

    __slots__ = ("_touched", "early", "staging")

    def __init__(self, staging: Staging, layout: Layout, address: int) -> None:
        self.staging = staging
        self.early = False  # the daemon was told that nothing more is written into it
        self._touched = False  # something may have been written, or may be
        super().__init__(staging, layout, address)

    def layer(self, layer: int) -> tuple[memoryview, memoryview]:
        self.early, self._touched = False, True
        return super().layer(layer)

    @property
    def payload(self) -> memoryview:
        self.early, self._touched = False, True
        return super().payload

    def fill(self, payload: memoryview, check: bool = False) -> None:
        """As any draft's; the daemon takes the checksums, whether or not ``check`` asks for them."""
        super().fill(payload)
        self.early, self._touched = not self._touched, True
        if self.early:  # else it may be copying already, or somebody has a view into it still
            self.staging.filled(self.address)


class Lending:
    """How clients get at bytes: here in memory that they share with the daemon, pinned where there is a device."""

    def __init__(self, pinning: Pinning) -> None:
        """``pinning`` is closed with this."""
        self._pinning = pinning

    def load(
        self,
        connection: Connection,
        match: LentMatch,
        name: int,
        packed: Any,
        sums: Callable[[], list[bytes | None]],
    ) -> Load:
        """See ``LentLoad.of``."""
        self._pinning.look()
        return LentLoad.of(connection, match, name, packed, sums)

    def drafts(self, connection: Connection, layout: Layout, found: Sequence[Sequence[int]]) -> list[Draft]:
        """Drafts that the daemon has room for: number, slot and offset of each."""
        self._pinning.look()
        staging = connection.staging
        for number, address, offset in found:
            staging.places[number] = address >> SLOT_BITS, offset, layout.full_slot_bytes
        return [LentDraft(staging, layout, number) for number, _, _ in found]

    def give(self, connection: Connection, drafts: Mapping[int, Draft], deadline: float) -> tuple[Given, float]:
        """See ``taken``; and when the save must be over. Raises ``Unreachable``."""
        return taken(drafts, connection.staging), deadline

    def gauges(self, connection: Connection) -> dict[str, int]:
        """How much of the memory here a device copies by itself; see ``Pinning.gauges``."""
        return self._pinning.gauges()

    def close(self) -> None:
        """When the session is over."""
        self._pinning.close()


def taken(drafts: Mapping[int, Draft], staging: Staging) -> Given:
    """Takes over drafts for a save: by block, each one's number, and whether it was filled in one go. Those of a
    session that is over are worth nothing any more."""
    given: Given = []
    for block, draft in drafts.items():
        if isinstance(draft, LentDraft) and draft.staging is staging:
            given.append((block, draft.take(), draft.early))
            staging.places.pop(draft.address, None)
        else:
            draft.discard()
    return given


class LentSaved(Saved):
    """A save that a daemon is about to do, before anything else that this client asks it."""

    def __init__(self, client: Callable[[int, float | None], Durable], ticket: Ticket, patience: float) -> None:
        """``client(number, timeout)`` waits for a save."""
        self._wait, self._ticket, self._patience = client, ticket, patience

    def _done(self) -> tuple[int, int, int]:
        """Number, tokens, new tokens; nothing is saved where the daemon does not answer."""
        try:
            number, tokens, new = self._ticket.wait(self._patience)
        except Unreachable:
            return 0, 0, 0
        return number, tokens, new

    def settled(self, timeout: float) -> bool:
        try:
            self._ticket.wait(timeout)
        except Unreachable:
            return False
        return True

    @property
    def tokens(self) -> int:
        return self._done()[1]

    @property
    def new_tokens(self) -> int:
        return self._done()[2]

    def wait(self, timeout: float | None = None) -> Durable:
        number = self._done()[0]
        try:
            return self._wait(number, timeout) if number else NOTHING
        except KVStoreError:
            return NOTHING


class NotSaved(Saved):
    """The daemon cannot be asked: nothing is saved."""

    def __init__(self) -> None:
        self._tokens = self._new_tokens = 0

    def wait(self, timeout: float | None = None) -> Durable:
        return NOTHING
