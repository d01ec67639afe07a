"""A daemon on another machine, as its clients have it: the same verbs, but bytes come and go through TLS.

A client has memory of its own, ``buffer`` bytes, for blocks that it loads and saves. What has come there stays,
whatever happens to the daemon.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from kvstore.daemon.bringing import PART, Bringer, Bringing, Brought, Room
from kvstore.daemon.caller import Caller
from kvstore.daemon.channel import Frames
from kvstore.daemon.client import Client
from kvstore.daemon.connection import Connection
from kvstore.daemon.held import Held
from kvstore.daemon.lent import Given, Lending, LentDraft, LentMatch, origin_of, taken
from kvstore.daemon.mapped import Mapped, Mappings
from kvstore.daemon.pinning import Pinning
from kvstore.daemon.pipe import Pipe
from kvstore.daemon.secured import dialled
from kvstore.daemon.wire import BadFrame, Kind, pack
from kvstore.errors import Unreachable
from kvstore.hot import Hold
from kvstore.layout import Layout
from kvstore.lease import Lease
from kvstore.load import Load, Source
from kvstore.residency import Resident
from kvstore.save import Draft

if TYPE_CHECKING:
    from ssl import SSLContext

MOMENT = 0.05  # seconds that a frame which has begun is waited for before others have their turn


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """Where a daemon is, whom to trust there, and who is asking. ``buffer``: bytes of the client's own memory."""

    host: str
    port: int
    token: str
    context: SSLContext
    buffer: int
    timeout: float


class FarConnection(Connection):
    """One session."""

    def __init__(self, place: Whereabouts, deadline: float) -> None:
        """Raises ``Unreachable``."""
        self._place, self.patience = place, place.timeout
        self.room = Room(place.buffer)
        self.slots: dict[int, int] = {}  # of drafts, by number
        self.bringer = Bringer(self.room, place.timeout, self._ring)
        pipe = dialled(place.host, place.port, place.context, deadline)
        self._begin(pipe, deadline, place.token, 0, Mappings(lambda _: None))

    def _second(self, limits: Mapping[str, Any], fds: Sequence[int], deadline: float) -> Pipe:
        self.bringer.beat = float(limits["ttl"]) / 4
        self._secured = pipe = dialled(self._place.host, self._place.port, self._place.context, deadline)
        try:
            pipe.settimeout(max(0.001, deadline - time.monotonic()))
            pipe.sendall(pack(Kind.REQUEST, 0, ["join", limits["join"]]))
            kind = Frames(pipe).read(deadline)[0]
            if kind != Kind.ANSWER:
                raise BadFrame("it does not take the second connection")
        except (OSError, BadFrame) as error:
            pipe.close()
            raise Unreachable(f"the daemon does not answer: {error}") from error
        return pipe

    @property
    def alive(self) -> bool:
        """What is here is this process's own."""
        return True

    def arena(self, staging: bool, number: int) -> Mapped:
        """A slot of the client's own memory."""
        return Mapped(self.room.view(number), self.room.pointer(number))

    def _was_filled(self, number: int) -> None:
        """Drafts are sent when they are saved."""

    # -- the thread ----------------------------------------------------------------------------------------------

    def _taken(self) -> tuple[list[tuple[int, int]], list[int]]:
        gone, drafts = super()._taken()
        self.leave(drafts)
        return gone, drafts

    def leave(self, drafts: Sequence[int]) -> None:
        """These drafts (numbers) need no memory here any more. Any thread."""
        self.room.leave([slot for number in drafts if (slot := self.slots.pop(number, None)) is not None])

    def _turn(self, now: float) -> float:
        self._events.settimeout(self.patience)
        for number, value in self.bringer.requests(now):
            self._events.sendall(pack(Kind.REQUEST, number, value))
        return self.bringer.due()

    def _happened(self, frames: Frames) -> None:
        """All that is there; the rest of a frame that is on its way comes in another turn."""
        more = True
        while more:
            try:
                kind, number, value, _ = frames.read(time.monotonic() + MOMENT)
            except TimeoutError:
                return
            if kind == Kind.EVENT:
                self._event(value)
            else:
                self.bringer.came(kind, number, value)
            more = self._secured.pending

    def _fail(self) -> None:
        super()._fail()
        self.bringer.fail()

    # -- what clients do -----------------------------------------------------------------------------------------

    def bring(self, match: LentMatch, name: int, packed: Sequence[Sequence[Any]]) -> Load:
        """A load of as many blocks as there is memory for: block, tokens, stride, form, layers there of each."""
        layout, room = match.layout, self.room
        bringing = Bringing(name, layout, len(packed))
        sources, slots, there = list[Source](), list[int](), list[int]()
        for number, tokens, _, _, stride, form, state in packed:
            address = room.reserve(layout.slot_bytes(stride))
            if address is None:
                break
            slots.append(address)
            resident = Resident(address, layout, stride, layout.token_payload * tokens, clean=True)
            origin, pointer = "host" if state is None else "disk", room.pointer(address)
            block = Brought(number, resident, room, bringing.runs, origin, pointer)
            bringing.blocks.append(block)
            there.append(_layers(layout, block, state))
            made = origin_of(match, len(sources), form)
            sources.append(Source(number, tokens, block, block.view, None, pointer, made))
        over_there = Lease(Held(name, len(packed)), self.lease_ended) if name != match.number else match.lease
        lease = Lease(slots, partial(_ended, bringing, room, over_there))
        match.loaded = True
        load = Load(match, sources, self, Hold(lease, []))
        self.bringer.begin(bringing, there)
        for place, (block, source) in enumerate(zip(bringing.blocks, packed, strict=False)):
            if source[-1] is not None:
                self.watch(name, place, Layers(self.bringer, bringing, place, block))
        return load

    def upload(self, number: int, layout: Layout) -> None:
        """Sends a draft, each piece within the timeout. Raises ``Unreachable``."""
        start = layout.header_bytes
        payload = self.room.view(self.slots[number])[start : start + layout.payload_bytes(layout.block_tokens)]
        for begin in range(0, len(payload), PART):
            piece = payload[begin : begin + PART]
            self.channel.tell("put", number, begin, piece, patience=self._place.timeout)


def _layers(layout: Layout, block: Brought, state: int | bytes | None) -> int:
    """Layers of a block that the daemon has, as bits."""
    if state is None:
        return (1 << len(layout.layers)) - 1
    if isinstance(state, int):
        block.fail()
        return 0
    return int.from_bytes(state, "little")


def _ended(bringing: Bringing, room: Room, over_there: Lease, slots: Sequence[int]) -> None:
    """The end of a load's lease; a finalizer, so it takes no lock."""
    bringing.over = True
    room.leave(slots)
    over_there.release()


class Layers:
    """A block of a load that is on its way over there, too."""

    def __init__(self, bringer: Bringer, load: Bringing, place: int, block: Brought) -> None:
        self._bringer, self._load, self._place = bringer, load, place
        self.fail, self.cancel = block.fail, block.cancel

    def catch_up(self, ready: int) -> None:
        """These layers (bits) can be asked for."""
        self._bringer.there(self._load, self._place, ready)


class FarLending(Lending):
    """Bytes come and go through the connection."""

    def __init__(self) -> None:
        super().__init__(Pinning())  # nothing is shared

    def load(
        self,
        connection: Connection,
        match: LentMatch,
        name: int,
        packed: Any,
        sums: Callable[[], list[bytes | None]],
    ) -> Load:
        """See ``FarConnection.bring``; checksums come with the bytes."""
        assert isinstance(connection, FarConnection)
        return connection.bring(match, name, packed)

    def drafts(self, connection: Connection, layout: Layout, found: Sequence[Sequence[int]]) -> list[Draft]:
        """Drafts that both sides have room for."""
        assert isinstance(connection, FarConnection)
        made: list[Draft] = []
        for number, _, _ in found:
            slot = connection.room.reserve(layout.full_slot_bytes)
            if slot is None:
                connection.let_go(number, -1)
                continue
            connection.slots[number] = slot
            connection.staging.places[number] = slot, 0, layout.full_slot_bytes
            made.append(LentDraft(connection.staging, layout, number))
        return made

    def give(self, connection: Connection, drafts: Mapping[int, Draft], deadline: float) -> tuple[Given, float]:
        """Sends them first. Raises ``Unreachable``."""
        assert isinstance(connection, FarConnection)
        given = taken(drafts, connection.staging)
        try:
            for block, number, _ in given:
                connection.upload(number, drafts[block].layout)
        except Unreachable:
            for _, number, _ in given:
                connection.let_go(number, -1)
            raise
        connection.leave([number for _, number, _ in given])
        return [(block, number, False) for block, number, _ in given], time.monotonic() + connection.patience

    def gauges(self, connection: Connection) -> dict[str, int]:
        """Of the client's own memory."""
        assert isinstance(connection, FarConnection)
        return connection.room.gauges()


class FarClient(Client):
    """Made by ``kvstore.connect("tls://host:port")``."""

    def __init__(self, place: Whereabouts) -> None:
        """Raises ``Unreachable`` when no daemon is there."""
        self._begin(caller_of(place), place.timeout, FarLending())


def caller_of(place: Whereabouts) -> Caller:
    """The way to a daemon elsewhere. Raises ``Unreachable``."""
    return Caller(f"tls://{place.host}:{place.port}", place.timeout, lambda deadline: FarConnection(place, deadline))
