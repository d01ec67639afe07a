"""One session with a daemon, as its client has it: two sockets, the arenas, and what is held over there.

A thread keeps the session alive, tells of what was let go, and takes in what happens meanwhile. Whoever lets go of
something may be a finalizer, in any thread, with any lock held: it leaves a note and rings a bell, and takes no lock.
"""

from __future__ import annotations

import contextlib
import logging
import math
import mmap
import os
import select
import socket
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvstore.daemon.bell import Bell
from kvstore.daemon.channel import Channel, Frames, close_all, connected, error_from
from kvstore.daemon.held import Coming, Ended, Held, Staging, Ticket, progress
from kvstore.daemon.mapped import Mapped, Mappings, Shared
from kvstore.daemon.pipe import Pipe
from kvstore.daemon.wire import VERSION, BadFrame, Kind, pack
from kvstore.errors import KVStoreError, Unreachable
from kvstore.hot import Hold

log = logging.getLogger("kvstore")

MAX_TICKETS = 4096  # answers that nobody has asked for yet
GROUP = 16 << 20  # bytes of filled drafts that are worth a message
STAGING_LATE = 0.05  # seconds between two looks at what a device may still be reading


class Connection:
    """One session. Any thread."""

    def __init__(self, path: Path, deadline: float, token: str | None, came: Callable[[Shared], None]) -> None:
        """``came`` is told of arenas that are mapped. Raises ``Unreachable``."""
        self._begin(connected(path, deadline), deadline, token, 2, Mappings(came))

    def _begin(self, pipe: Pipe, deadline: float, token: str | None, wanted: int, mappings: Mappings) -> None:
        """Says hello, to which so many descriptors are an answer."""
        self.channel, fds = Channel(pipe, mappings.arrived, self._late), list[int]()
        self._mappings = mappings
        try:
            said, fds = self.channel.hello(token, deadline, wanted)
            version, self.epoch, self.number, self.tenant, limits = said
            if version != VERSION:
                raise Unreachable(f"the daemon speaks version {version}, and this process version {VERSION}")
            self._events = self._second(limits, fds, deadline)
        except BaseException as error:
            self.channel.close()
            close_all(fds)
            senseless = isinstance(error, OSError | ValueError | TypeError | LookupError)
            if senseless and not isinstance(error, KVStoreError):
                raise Unreachable(f"what the daemon says cannot be understood: {error}") from error
            raise
        self.channel.limit = limits["frame"]
        self.saved = 0.0  # seconds that the daemon is not told of yet; guarded by _lock
        self.staging = Staging(lambda number: self.arena(True, number), self._abandoned, self._was_filled)
        self._beat = float(limits["ttl"]) / 4
        self._lock = threading.Lock()  # guards the fields below
        self._fetches: dict[tuple[int, int], Coming] = {}
        self._early = OrderedDict[tuple[int, int], int]()  # what was heard of fetches before they were known
        self._tickets = OrderedDict[int, Ticket]()
        self._over = False  # nothing more comes
        # Filled by finalizers, without a lock; the thread's own otherwise.
        self._gone = deque[tuple[int, int]]()  # number and first block that is let go; -1: it is a draft's
        self._ended, self._filled, self._untold = Ended(), deque[int](), 0
        self._bell = Bell()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="kvstore-client", daemon=True)
        self._thread.start()

    def _second(self, limits: Mapping[str, Any], fds: Sequence[int], deadline: float) -> Pipe:
        """The second socket; takes over the descriptors, unless it raises."""
        self._page = mmap.mmap(fds[1], mmap.PAGESIZE, prot=mmap.PROT_READ)
        events = socket.socket(fileno=fds[0])
        os.close(fds[1])
        return events

    @property
    def alive(self) -> bool:
        """Whether what is held is held: false for good, once the daemon took this process for dead, or has stopped.

        A daemon that was killed does not say so, and writes nothing either: what it had shown stays as it was."""
        return self._page[0] == 1

    @property
    def usable(self) -> bool:
        """Whether calls may be answered."""
        return not self.channel.broken and self.alive

    def arena(self, staging: bool, number: int) -> Mapped:
        """An arena that came with some answer. Raises ``TierError``."""
        return self._mappings.get(staging, number)

    def ticket(self, number: int) -> Ticket:
        """Where the event that answers request ``number`` comes to."""
        with self._lock:
            found, over = self._tickets.setdefault(number, Ticket()), self._over
        if over:
            found.settle(error=Unreachable("the daemon is gone"))
        return found

    def watch(self, name: int, place: int, fetch: Coming) -> None:
        """Tells a fetch what the daemon says of that block of a load."""
        with self._lock:
            self._fetches[name, place] = fetch
            state, over = self._early.pop((name, place), None), self._over
        if over:
            fetch.cancel()
        if state is not None:
            progress(fetch, state)

    # -- what finalizers call: no lock ---------------------------------------------------------------------------

    def let_go(self, number: int, start: int) -> None:
        """Nobody here needs this any more."""
        self._gone.append((number, start))
        self._ring()

    def spared(self, seconds: float) -> None:
        """Tells the daemon, with the next beat, what loads have spared an engine."""
        with self._lock:
            self.saved += seconds

    def _abandoned(self, address: int) -> None:
        self.let_go(address, -1)

    def _was_filled(self, number: int) -> None:
        """Small blocks are told of in groups: what is not told when it is saved is copied then."""
        self._filled.append(number)
        self._untold += self.staging.places[number][2]
        if self._untold >= GROUP:
            self._untold = 0
            self._ring()

    def lease_ended(self, held: Sequence[int]) -> None:
        """A lease of this session's is over."""
        if isinstance(held, Held):
            self.let_go(held.number, held.start)

    @property
    def hot(self) -> None:
        """No client has a device tier: its own device is its own business."""
        return None

    def load_ended(self, hold: Hold) -> None:
        """A load is over; its lease ends when the device is done with what it reads. When the session is over there is
        nothing to hold: what is mapped stays, and nobody writes there for this session's sake."""
        if hold.events and not self._closing:
            self._ended.add(hold)
            self._ring()
        else:
            hold.lease.release()

    def _ring(self) -> None:
        if not self._closing:
            self._bell.ring()

    # -- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        frames, next_beat = Frames(self._events), 0.0
        poll = select.poll()
        poll.register(self._events, select.POLLIN)
        poll.register(self._bell, select.POLLIN)
        try:
            while not self._closing:
                busy = self._ended.settle()
                now = time.monotonic()
                gone, drafts = self._taken()
                filled = [self._filled.popleft() for _ in range(len(self._filled))]
                if now >= next_beat or gone or drafts or filled:
                    with self._lock:
                        saved, self.saved = self.saved, 0.0
                    self._events.settimeout(self._beat)
                    self._events.sendall(pack(Kind.EVENT, 0, [gone, drafts, filled, saved]))
                    next_beat = now + self._beat
                due = min(next_beat, self._turn(now))
                ready = poll.poll((STAGING_LATE if busy else max(0.0, due - now)) * 1000)
                for fd, _ in ready:
                    if fd == self._bell.fileno():
                        self._bell.heard()
                    else:
                        self._happened(frames)
        except (OSError, BadFrame) as error:
            if not self._closing:
                log.warning("the daemon is gone: %s", str(error))  # not what holds the frames, and so the session
        self._fail()

    def _turn(self, now: float) -> float:
        """Does what else there is to do; until when it is all."""
        return math.inf

    def _taken(self) -> tuple[list[tuple[int, int]], list[int]]:
        gone, drafts = list[tuple[int, int]](), list[int]()
        while self._gone:
            number, start = self._gone.popleft()
            if start < 0:
                self.staging.places.pop(number, None)
                drafts.append(number)
            else:
                gone.append((number, start))
        if gone:
            over = {number for number, start in gone if not start}
            with self._lock:
                for key in [key for key in self._fetches if key[0] in over]:
                    del self._fetches[key]
        return gone, drafts

    def _happened(self, frames: Frames) -> None:
        kind, _, value, _ = frames.read(time.monotonic() + self._beat)
        if kind != Kind.EVENT:
            raise BadFrame("this is no event")
        self._event(value)

    def _event(self, value: Any) -> None:
        what, *arguments = value
        if what == "progress":
            name, place, state = arguments
            bits = state if isinstance(state, int) else int.from_bytes(state, "little")
            with self._lock:
                fetch = self._fetches.get((name, place))
                if fetch is None:
                    self._early[name, place] = bits
                    while len(self._early) > MAX_TICKETS:
                        self._early.popitem(last=False)
            if fetch is not None:
                progress(fetch, bits)
        elif what in ("done", "failed"):
            number, result = arguments
            ticket = self.ticket(number)
            ticket.settle(result) if what == "done" else ticket.settle(error=error_from(*result))
            with self._lock:
                while len(self._tickets) > MAX_TICKETS:
                    self._tickets.popitem(last=False)
        elif what == "retired":
            self._mappings.retire(*arguments)

    def _fail(self) -> None:
        """Nothing more will come: who waits learns it."""
        self.channel.broken = True
        self._ended.release()
        with self._lock:
            self._over = True
            fetches, tickets = list(self._fetches.values()), list(self._tickets.values())
            self._fetches.clear()
        for fetch in fetches:
            fetch.cancel()
        for ticket in tickets:
            ticket.settle(error=Unreachable("the daemon is gone"))

    def _late(self, verb: str, value: Any) -> None:
        """An answer that nobody waits for any more: what it holds is let go."""
        if verb in ("match", "load"):
            self.let_go(value[0], 0)
        elif verb == "drafts":
            for number, _, _ in value:
                self.let_go(number, -1)

    def close(self) -> None:
        """Ends the session, and the thread; again is no error."""
        if self._closing:
            return
        self._closing = True
        self.channel.close()
        with contextlib.suppress(OSError):
            self._events.shutdown(socket.SHUT_RDWR)  # a thread that writes or reads there does not any more
        self._bell.ring()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self._events.close()
        self._mappings.close()
