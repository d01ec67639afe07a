"""Loads of a client on another machine: their blocks' bytes are asked for a few requests ahead, layer 0 of all first.

Blocks are brought into private memory and checked there, so that nobody can take them away.
"""

from __future__ import annotations

import heapq
import logging
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvstore.block import piece_start
from kvstore.checksum import digests
from kvstore.daemon.wire import BadFrame, Kind
from kvstore.fetch import Fetch, parts_of
from kvstore.layout import Layout
from kvstore.residency import Resident
from kvstore.tiers.host import HostTier

log = logging.getLogger("kvstore")

PART = 512 << 10  # bytes that one request asks for
AHEAD = (4 << 20) - PART  # that are asked for before more is: a daemon drops who leaves more than 4 MiB unread
LEAST_RUN = 64 << 10  # of a block that are asked for together, if there are others


class Room:
    """Memory of a client's own, in slots, for its loads and drafts. Any thread."""

    def __init__(self, capacity: int) -> None:
        """Raises ``BadInput`` when so many bytes cannot be had."""
        self.lock = threading.Lock()
        self._tier = HostTier(capacity, touch=False)
        self._left = deque[int]()  # slots that nobody needs any more; filled by finalizers, without the lock

    def reserve(self, size: int) -> int | None:
        """A slot, or None when there is no room."""
        with self.lock:
            while self._left:
                self._tier.free(self._left.popleft())
            address = self._tier.reserve(size)
            if address is None:
                self._tier.trim()
                address = self._tier.reserve(size)
            return address

    def leave(self, slots: Sequence[int]) -> None:
        """Gives slots back; whoever writes to one holds the lock and looks whether it is his still."""
        self._left.extend(slots)

    def view(self, address: int) -> memoryview:
        """The slot's bytes."""
        return self._tier.view(address)

    def pointer(self, address: int) -> int:
        """Where they begin in memory."""
        return self._tier.pointer(address)

    def gauges(self) -> dict[str, int]:
        """See ``HostTier.gauges``."""
        return self._tier.gauges()


class Brought(Fetch):
    """One block on its way from another machine."""

    def __init__(
        self, number: int, resident: Resident, room: Room, runs: Sequence[tuple[int, int]], origin: str, pointer: int
    ) -> None:
        """``runs``: layers (first, last + 1) that come together. ``origin``: its tier, over there."""
        super().__init__(number, resident, room.view(resident.address), resident.address, resident.layout.header_bytes)
        self.parts, self.pointer, self._origin = list(runs), pointer, origin
        self.sums: list[list[bytes | None]] = [[] for _ in runs]  # of each run, as they come
        self.missing = [self.offsets[last] - self.offsets[first] for first, last in runs]  # bytes of each

    @property
    def tier(self) -> str:
        return self._origin

    def write(self, run: int, offset: int, data: memoryview) -> None:
        """Bytes of a run, from this place of it on."""
        start = self.header_bytes + self.offsets[self.parts[run][0]] + offset
        self.view[start : start + len(data)] = data
        self.missing[run] -= len(data)

    def sound(self, run: int) -> bool:
        """Whether a run that is there has the checksums that it should have, where they are known."""
        (first, last), stride = self.parts[run], self.resident.stride
        known = [data for data in self.sums[run] if data is not None]
        if len(known) < len(self.sums[run]):
            return True
        expected, payload = array("Q", b"".join(known)), self.view[self.header_bytes :]
        begin, end = piece_start(self.layout, first), piece_start(self.layout, last)
        return digests(self.layout, stride, payload, self.pointer + self.header_bytes, begin, end) == expected


class Bringing:
    """One load. Guarded by its bringer's lock, but for ``over``."""

    def __init__(self, name: int, layout: Layout, blocks: int) -> None:
        self.name, self.over = name, False  # over: nobody wants it any more
        run = max(PART // max(blocks, 1), LEAST_RUN)
        self.runs = parts_of(layout.layer_offsets(layout.block_tokens), run)
        self.blocks: list[Brought] = []
        self._ready: list[tuple[int, int, int]] = []  # heap of what can be asked for: run, block, bytes asked for
        self._there: dict[int, int] = {}  # by block: layers that the daemon has, as bits, until it has all
        self._known: dict[int, int] = {}  # and runs that are in ``_ready`` or were, as bits

    def there(self, place: int, layers: int) -> None:
        """The daemon has these layers (bits) of a block."""
        self._there[place] = layers = self._there.get(place, 0) | layers
        known = self._known.get(place, 0)
        for number, (first, last) in enumerate(self.runs):
            wanted = (1 << last) - (1 << first)
            if layers & wanted == wanted and not known >> number & 1:
                known |= 1 << number
                heapq.heappush(self._ready, (number, place, 0))
        self._known[place] = known

    def take(self) -> list[tuple[int, int, int, int]]:
        """What to ask for next, ``PART`` bytes at most: block, run, place in the run, bytes."""
        taken, left = [], PART
        while self._ready and left:
            run, place, asked = heapq.heappop(self._ready)
            block, (first, last) = self.blocks[place], self.runs[run]
            whole = block.offsets[last] - block.offsets[first]
            size = min(whole - asked, left)
            left -= size
            if not block.failed:
                taken.append((place, run, asked, size))
                if asked + size < whole:
                    heapq.heappush(self._ready, (run, place, asked + size))
        return taken

    @property
    def done(self) -> bool:
        """Whether nothing more will be asked for."""
        return self.over or all(block.failed or block.complete for block in self.blocks)


@dataclass(slots=True)
class Asked:
    """One request that is under way. ``parts``: see ``Bringing.take``."""

    load: Bringing | None
    parts: list[tuple[int, int, int, int]]
    at: float
    bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.bytes = sum(size for _, _, _, size in self.parts)


class Bringer:
    """All loads of one session. ``requests``, ``came`` and ``due`` are its thread's."""

    def __init__(self, room: Room, timeout: float, ring: Callable[[], None]) -> None:
        """``timeout``: seconds that an answer may take. ``ring`` wakes the session's thread."""
        self._room, self._timeout, self._ring = room, timeout, ring
        self._lock = threading.Lock()  # guards the fields below, and what is in loads
        self._loads: list[Bringing] = []
        self._over = False
        self._asked, self._flying = deque[tuple[int, Asked]](), 0  # the thread's own
        self._number, self._heard = 0, time.monotonic()
        self.beat = timeout  # seconds between two signs of life that the daemon wants

    # -- any thread ----------------------------------------------------------------------------------------------

    def begin(self, load: Bringing, there: Sequence[int]) -> None:
        """Brings a load; of each block these layers (bits) are there."""
        with self._lock:
            if not self._over:
                self._loads.append(load)
            for place, layers in enumerate(there):
                load.there(place, layers)
            over = self._over
        if over:
            _give_up(load)
        self._ring()

    def there(self, load: Bringing, place: int, layers: int) -> None:
        """The daemon has these layers (bits) of a block, too."""
        with self._lock:
            load.there(place, layers)
        self._ring()

    def fail(self) -> None:
        """Nothing more will come."""
        with self._lock:
            self._over = True
            loads, self._loads = self._loads, []
        for load in loads:
            _give_up(load)

    # -- the session's thread ------------------------------------------------------------------------------------

    def requests(self, now: float) -> list[tuple[int, list[object]]]:
        """What is to be sent now: number and value. Raises ``TimeoutError`` when an answer is too late."""
        if self._asked and now > self.due():
            raise TimeoutError("it does not answer")
        sent = []
        with self._lock:
            self._loads = [load for load in self._loads if not load.done]
            while self._flying < AHEAD:
                found = next(((load, parts) for load in self._loads if (parts := load.take())), None)
                if found is None:
                    break
                load, parts = found
                starts = [load.blocks[place].offsets[load.runs[run][0]] for place, run, _, _ in parts]
                ranges = [[part[0], start + part[2], part[3]] for part, start in zip(parts, starts, strict=True)]
                sent.append(self._ask(Asked(load, parts, now), ranges))
        if not self._asked and now >= self.due():
            sent.append(self._ask(Asked(None, [], now), []))
        return sent

    def _ask(self, asked: Asked, ranges: list[list[int]]) -> tuple[int, list[object]]:
        self._number += 1
        self._asked.append((self._number, asked))
        self._flying += asked.bytes
        return self._number, [asked.load.name if asked.load else 0, ranges]

    def due(self) -> float:
        """When the next answer must be there, or else when to ask whether anybody is. A daemon that says nothing is
        not waited for; one that nobody waits for has more time."""
        patience = self._timeout if self._loads else max(self._timeout, self.beat)
        if self._asked:
            return max(self._asked[0][1].at, self._heard) + patience
        return self._heard + patience / 2

    def came(self, kind: Kind, number: int, value: Any) -> None:
        """An answer. Raises ``BadFrame``."""
        if not self._asked or self._asked[0][0] != number:
            raise BadFrame("this answers nothing")
        _, asked = self._asked.popleft()
        self._flying -= asked.bytes
        self._heard = time.monotonic()
        load = asked.load
        if load is None:
            return
        if kind != Kind.ANSWER:
            if not load.over:
                log.debug("bytes of a block do not come: %s", value)
            for place, _, _, _ in asked.parts:
                load.blocks[place].fail()
            return
        try:
            data, sums = value
            fits = len(data) == asked.bytes and len(sums) == len(asked.parts)
        except (TypeError, ValueError):
            fits = False
        if not fits:
            raise BadFrame("this is not what was asked for")
        begin, view = 0, memoryview(data)
        for (place, run, offset, size), known in zip(asked.parts, sums, strict=True):
            block = load.blocks[place]
            self._place(load, block, run, offset, view[begin : begin + size], known)
            if not block.missing[run]:
                block.took(run, asked.at, self._heard)
            begin += size

    def _place(
        self, load: Bringing, block: Brought, run: int, offset: int, data: memoryview, known: bytes | None
    ) -> None:
        with self._room.lock:
            if load.over:
                return
            block.write(run, offset, data)
        block.sums[run].append(known)
        if block.missing[run]:
            return
        if block.sound(run):
            block.arrive(*block.parts[run])
        elif block.fail() and not load.over:
            log.warning("a block came from the daemon with other bytes than were saved; it is a miss")


def _give_up(load: Bringing) -> None:
    for block in load.blocks:
        if not block.complete:
            block.cancel()
