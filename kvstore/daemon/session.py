"""What one client holds: matches, loads, drafts. All of it ends with its connection, or when it was silent too long."""

from __future__ import annotations

import itertools
import logging
import mmap
import os
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kvstore.daemon.area import Area
from kvstore.daemon.arenas import Allowance, Arenas, create
from kvstore.daemon.link import Link
from kvstore.daemon.peer import Peer
from kvstore.daemon.wire import Kind
from kvstore.errors import BadInput, TierError
from kvstore.fetch import Fetch
from kvstore.job import Job
from kvstore.keeper import Pinned
from kvstore.load import Load
from kvstore.local import LocalStore
from kvstore.match import Match
from kvstore.save import Saved
from kvstore.tiers.host import HostTier
from kvstore.tiers.slab import SLOT_BITS

log = logging.getLogger("kvstore")

MAX_HELD = 65536  # matches and loads of one client
MAX_SAVES = 1024  # of one client, that it can wait for
GONE = -1  # a fetch that failed
PAGE = mmap.PAGESIZE


@dataclass(slots=True)
class Tenant:
    """A security domain: a store of its own, the memory that clients see of it, what they may fill at once."""

    name: str
    store: LocalStore
    host: HostTier  # the store's
    arenas: Arenas  # of the host tier
    staging: Allowance
    remote: bool = False  # a match may ask others, and takes as long
    sessions: list[Session] = field(default_factory=list)


class House(Protocol):
    """The daemon, as its sessions know it."""

    tenants: dict[str, Tenant]
    epoch: str  # of this daemon: another one holds other blocks under the same numbers
    started: float  # monotonic
    ttl: float  # seconds that a silent client is waited for
    refused: int  # connections of those who are nobody's here
    about: Mapping[str, str]  # what else its operator may know: version, settings

    def run_soon(self, function: Callable[..., object], *arguments: object) -> None:
        """Has the loop's thread call it. Any thread."""


class Session:
    """One client. Methods are called in the loop's thread, but where they say otherwise."""

    def __init__(self, number: int, tenant: Tenant, peer: Peer, link: Link, house: House) -> None:
        self.number, self.tenant, self.peer, self.link, self.house = number, tenant, peer, link, house
        self.store = tenant.store
        self.since, self.seen = time.time(), time.monotonic()
        self.matches: dict[int, Match] = {}
        self.loads: dict[int, Load] = {}
        self.pins: dict[int, Pinned] = {}
        self.saves = OrderedDict[int, Saved]()  # the last ones; guarded by _lock
        self._lock = threading.Lock()
        self.jobs: list[Job] = []
        self.events: Link | None = None
        self.waits = 0  # long requests that are under way
        self._names, self._run_soon = itertools.count(1), house.run_soon
        self._sent: set[tuple[bool, int]] = set()  # arenas that the client has: (staging, number)
        self._told: dict[tuple[int, int], int] = {}  # of fetches, what the client was told last
        self.area = Area(f"staging-{number}", tenant.staging, self._retired)
        self._fd, self._page = create(f"session-{number}", PAGE, writable=False)
        self._page[0] = 1
        self.ended, self.saving = False, 0  # saves under way

    # -- what the client has to see ------------------------------------------------------------------------------

    def page_fd(self) -> int:
        """A descriptor of the page whose first byte is 1 as long as what the client holds is held."""
        return os.dup(self._fd)

    def show(self, addresses: Sequence[int], staging: bool = False) -> tuple[list[list[object]], list[int]]:
        """The arenas of these slots that the client does not have yet, with descriptors. Raises ``TierError``."""
        arenas, fds, sent = list[list[object]](), list[int](), list[int]()
        if self.peer.place:  # no memory is shared with another machine
            return arenas, fds
        numbers = {address >> SLOT_BITS for address in addresses}
        try:
            for number in sorted(number for number in numbers if (staging, number) not in self._sent):
                arena = (self.area.arenas if staging else self.tenant.arenas).get(number)
                if arena is not None:
                    arenas.append([staging, number, arena.bytes])
                    fds.append(arena.fd)
                    sent.append(number)
        except OSError as error:
            for fd in fds:
                os.close(fd)
            raise TierError(f"memory cannot be handed out: {error}") from error
        self._sent.update((staging, number) for number in sent)
        return arenas, fds

    def retired(self, number: int, staging: bool = False) -> None:
        """An arena is no more: the client may let go of it, too."""
        if (staging, number) in self._sent:
            self._sent.discard((staging, number))
            self.tell("retired", staging, number)

    def _retired(self, number: int) -> None:
        """May be called in any thread, under the lock."""
        self._run_soon(self.retired, number, True)

    def tell(self, what: str, *arguments: object) -> None:
        """Sends an event."""
        if self.events is not None and not self.ended:
            self.events.send(Kind.EVENT, 0, [what, *arguments])

    # -- what it holds -------------------------------------------------------------------------------------------

    def keep(self, match: Match) -> int:
        """Keeps a match under a new number."""
        if len(self.matches) + len(self.loads) >= MAX_HELD:
            match.release()
            raise BadInput(f"this client holds {MAX_HELD} matches and loads; release some")
        number = next(self._names)
        self.matches[number] = match
        return number

    def match(self, number: int) -> Match:
        """The match of this number. Raises ``BadInput``."""
        match = self.matches.get(number)
        if match is None:
            raise BadInput("the match was released, or its load was; match again")
        return match

    def begin(self, number: int) -> tuple[int, Load]:
        """Loads a match; of two loads of one match, the second gets a number of its own."""
        match, name = self.match(number), number
        if number in self.loads:
            name = next(self._names)
        load = self.store.load(match)
        self.loads[name] = load
        for place, source in enumerate(load.sources):
            if isinstance(source.held, Fetch):
                self._watch(name, place, source.held)
        return name, load

    def _watch(self, name: int, place: int, fetch: Fetch) -> None:
        def told() -> None:
            """Any thread."""
            state = GONE if fetch.failed else fetch.ready
            self._run_soon(self._progress, name, place, state)

        fetch.watch(told)

    def _progress(self, name: int, place: int, state: int) -> None:
        if name in self.loads and self._told.get((name, place)) != state:
            self._told[name, place] = state
            self.tell("progress", name, place, packed_bits(state))

    def release(self, number: int, start: int) -> None:
        """The client lets go of a match or load, or of what stands from block ``start`` on."""
        if start:
            self.cut(number, start)
            return
        load, match = self.loads.pop(number, None), self.matches.pop(number, None)
        if load is not None:
            for place in range(len(load.sources)):
                self._told.pop((number, place), None)
            load.release()
        if match is not None:
            match.release()

    def cut(self, number: int, blocks: int) -> None:
        """The client keeps only the first blocks of a match."""
        match = self.matches.get(number)
        if match is not None and match.lease.active:
            match.cut(match.skipped + sum(tokens for _, tokens in match.blocks[:blocks]))

    def pin(self, pinned: Pinned) -> int:
        """Remembers a pin, so that the client can end it; the pin itself does not end with the client."""
        number = next(self._names)
        if len(self.pins) < MAX_HELD:
            self.pins[number] = pinned
        return number

    @property
    def held(self) -> tuple[int, int, int]:
        """Matches and loads, drafts, and bytes of the staging area."""
        return len(self.matches) + len(self.loads), self.area.count, self.area.bytes

    def waiting(self) -> list[Job]:
        """The client's queue, without jobs whose match was released meanwhile."""
        return [job for job in self.jobs if job.match is None or job.match.lease.active]

    def remember(self, saved: Saved) -> int:
        """Keeps a save under a number, for who waits for it. Any thread."""
        number = next(self._names)
        with self._lock:
            self.saves[number] = saved
            while len(self.saves) > MAX_SAVES:
                self.saves.popitem(last=False)
        return number

    def save_over(self) -> None:
        """One save less is under way."""
        self.saving -= 1
        if self.ended and not self.saving:
            self.area.close()

    # -- its end -------------------------------------------------------------------------------------------------

    def let_go(self) -> None:
        """Lets go of all that is read; again is no error. The page says so first: whoever copies what is not held any
        more looks at it afterwards."""
        self._page[0] = 0
        for load in self.loads.values():
            load.release()
        for match in self.matches.values():
            match.release()
        self.loads.clear()
        self.matches.clear()
        self.jobs.clear()
        self._told.clear()

    def end(self) -> None:
        """Lets go of everything, but of drafts only when saves under way have copied them; again is no error."""
        if self.ended:
            return
        self.ended = True
        self.let_go()
        if not self.saving:
            self.area.close()
        self._page.close()
        os.close(self._fd)
        if self.events is not None:
            self.events.close()


def packed_bits(state: int) -> int | bytes:
    """Layers that are there, as bits, or GONE, for the wire."""
    return state if state < 0 else state.to_bytes(state.bit_length() // 8 + 1, "little")


def events_of(session: Session, limit: int, heard: Callable[..., None], lost: Callable[..., None]) -> int:
    """Makes the second socket of a session; returns the client's end."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    session.events = Link(ours, limit, heard, lost)
    return theirs.detach()
