"""Starts loads: what a match found is brought to host memory, layer 0 of all blocks first."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from kvstore.families import NONE
from kvstore.fetch import Fetch
from kvstore.hot import Hold, Hot, Slot
from kvstore.intake import Intake
from kvstore.keys import TOKEN_BYTES
from kvstore.lease import Lease
from kvstore.load import Load, Source
from kvstore.match import Match
from kvstore.mover import Mover, Priority
from kvstore.prospect import Prospect, prospect
from kvstore.remote.tier import RemoteTier
from kvstore.residency import Residency, Resident
from kvstore.room import held_bytes, reserve_host
from kvstore.tensors.streams import ThreadStream

log = logging.getLogger("kvstore")

LEASE_SHARE = 0.75  # of the host tier's capacity that leases may hold


class Loader:
    """Starts fetches, which its ``Intake`` settles. One per store."""

    def __init__(self, residency: Residency, mover: Mover, remote: RemoteTier | None = None) -> None:
        self._residency, self._mover, self._remote = residency, mover, remote
        self._intake = Intake(residency, mover, remote)
        self.submit = self._intake.submit  # asks for a part of a fetch that was started; not locked
        self._fetches, self.ahead = self._intake.fetches, self._intake.ahead
        self._worker: ThreadStream | None = None  # guarded by residency.lock
        self.reserve: Callable[[int], int | None] = partial(reserve_host, residency)  # a host slot for a load; locked
        self._holds: weakref.WeakSet[Hold] = weakref.WeakSet()  # of loads that streams may still work for

    def load(self, match: Match, device: bool = False) -> Load:
        """Starts bringing a match's blocks to host memory; takes over its lease (of two loads, the first). Any thread.

        With ``device``, blocks that are on the device need no bringing, and others get a slot there, if there is room.
        """
        residency = self._residency
        sources: list[Source] = []
        started: list[Fetch] = []
        hurried: list[tuple[Fetch, int]] = []
        slots: list[Slot] = []
        position = 0
        with residency.lock:
            residency.check_open()
            lease = match.lease
            if match.loaded and lease.active:  # another load has taken it, and may end it while this one reads
                numbers = [number for number, _ in match.blocks]
                residency.hold(numbers)
                lease = Lease(numbers, residency.lease_ended)
            match.loaded = True
            hot = residency.hot if device else None
            room = int(residency.host.capacity * LEASE_SHARE) - held_bytes(residency)
            for number, tokens in match.blocks if lease.active else ():  # else others may have the numbers by now
                slot = hot.find(number) if hot is not None else None
                held: Resident | Fetch | None = None
                if slot is not None:
                    slots.append(slot)
                else:
                    held = residency.residents.get(number) or self._fetches.get(number)
                    if held is None:
                        room -= match.layout.full_slot_bytes
                        held = self.start(number, Priority.DEMAND, (0, len(started))) if room >= 0 else None
                        if held is None:
                            residency.counters.add("loads_cut")
                            break
                        started.append(held)
                    elif isinstance(held, Fetch):
                        hurried += [(held, part) for part in held.hasten(len(sources))]
                    self._used(number, held)
                piece = match.token_ids[position : position + tokens * TOKEN_BYTES]
                if not self._promises(held, number, piece):
                    break
                position += len(piece)
                origin = residency.index.kind_of(number).origin
                sources.append(Source(number, tokens, held, self._view(held), slot, self._base(held), origin))
            chain = [number for number, _ in match.blocks]
            residency.host_policy.arrange(chain)
            for tell in (residency.admit, residency.share):
                tell(chain if lease.active else ())
            if hot is not None:
                sources = _placed(sources, hot, slots)
            hold = Hold(lease, slots)
            self._holds.add(hold)
        for fetch, part in [*((fetch, 0) for fetch in started), *hurried]:
            self.submit(fetch, part)
        return Load(match, sources, residency, hold)

    def prospect(self, matches: Sequence[Match], device: bool) -> Prospect:
        """See ``Store.prospect``."""
        rates = self._mover.rates
        disk, writing, part = rates.reads, rates.writing, rates.part_bytes
        with self._residency.lock:
            self._residency.check_open()
            remote = None if self._remote is None else self._remote.reads
            return prospect(matches, device, self._residency, self._fetches, (disk, remote), writing, part)

    def gauges(self) -> dict[str, int]:
        """How the disk is; nothing where there is none. Any thread."""
        if self._residency.disk is None:
            return {}
        with self._residency.lock:
            queued = sum(fetch.left for fetch in self._fetches.values() if fetch.block is None)
        return {**self._mover.rates.gauges(), "disk_queued_read_bytes": queued}

    def _view(self, held: Resident | Fetch | None) -> memoryview | None:
        if held is None:
            return None
        return held.view if isinstance(held, Fetch) else self._residency.host.view(held.address)

    def _base(self, held: Resident | Fetch | None) -> int:
        resident = held.resident if isinstance(held, Fetch) else held
        return 0 if resident is None else self._residency.host.pointer(resident.address)

    def start(self, number: int, priority: Priority, turn: tuple[int, int]) -> Fetch | None:
        """A fetch of a block that is on disk, or else in the remote tier, whose first part the caller submits; None: no
        room. Locked."""
        residency, index = self._residency, self._residency.index
        address, stride, block = index.disk[number], index.stride[number], None
        layout = index.kind_of(number).layout
        if address == NONE:
            block, stride = index.remote.get(number), layout.block_tokens
            if block is None:
                return None
        demand, size = priority == Priority.DEMAND, layout.class_bytes(stride)
        slot = self.reserve(size) if demand else reserve_host(residency, size)
        if slot is None:
            return None
        resident = Resident(slot, layout, stride, residency.payload(number), clean=block is None)
        view, part = residency.host.view(slot), self._mover.rates.part_bytes
        fetch = Fetch(number, resident, view, address, layout.header_bytes, priority, turn, part, block)
        residency.hold([number])
        self._fetches[number] = fetch
        if block is not None:
            block.taken = True
        # Known to the policy from the start, so that its chain can be put in order at once.
        residency.host_policy.insert(number, residency.arrival(number))
        if not demand:
            self.ahead[number] = resident
        return fetch

    def _used(self, number: int, held: Resident | Fetch) -> None:
        """A load has a block of which ``ahead`` may know. Locked."""
        before = self.ahead.pop(number, None)
        if before is not None:
            same = before is (held.resident if isinstance(held, Fetch) else held)
            self._residency.counters.add("prefetch_used_blocks" if same else "prefetch_wasted_blocks")

    def take_back(self, fetch: Fetch) -> bool:
        """Ends a prefetch that nobody waits for and that no worker has begun; False: it goes on. Locked."""
        if not fetch.take_back():
            return False
        residency, number = self._residency, fetch.number
        del self._fetches[number]
        self.ahead.pop(number, None)
        residency.host_policy.remove(number)
        residency.host.free(fetch.resident.address)
        if fetch.block is not None:
            fetch.block.taken = False
        residency.unhold([number])
        residency.counters.add("prefetch_cancelled_blocks")
        residency.changed.notify_all()
        return True

    @property
    def fetches(self) -> Mapping[int, Fetch]:
        """Those that have not settled, by block, oldest first. Locked."""
        return self._fetches

    def _promises(self, source: Resident | Fetch | None, number: int, piece: bytes) -> bool:
        """Whether the block starts with these tokens; of one under way its header will tell, or fail it. Locked.

        The key says so already. A hash that is broken must cost hits and never give wrong bytes.
        """
        if not isinstance(source, Fetch):
            return self._residency.index.tokens_of(number).startswith(piece)
        source.promised.append(piece)
        return source.header is None or source.header.tokens.startswith(piece)

    def worker(self) -> ThreadStream:
        """The thread that brings layers to engines ahead of their asking; started by the first who asks. Any thread."""
        with self._residency.lock:
            self._residency.check_open()
            if self._worker is None:
                self._worker = ThreadStream("kvstore-ahead", tells=False)
            return self._worker

    def close(self) -> None:
        """The movers are closed: what waits for them fails, the worker's thread ends, and streams have done what was
        asked of them for loads: the memory that they work on goes next."""
        self._intake.abort()
        if self._worker is not None:
            self._worker.close()
        for hold in list(self._holds):
            for event in list(hold.events):
                try:
                    event.wait()
                except RuntimeError as error:
                    log.warning("the device has failed, and works on no memory any more: %s", error)


def _placed(sources: list[Source], hot: Hot, slots: list[Slot]) -> list[Source]:
    """The sources with slots for those that have none, as far as there is room; ``slots`` gets the new ones. Locked."""
    chain = [source.number for source in sources]
    hot.touch(chain)  # so that no block makes room for another of the same prompt, if others can
    with_slots = []
    for at, source in enumerate(sources):
        if source.held is not None and not hot.placed(source.number):
            held = source.held.resident if isinstance(source.held, Fetch) else source.held
            slot = hot.place(source.number, held.layout, held.stride)
            if slot is None:
                with_slots += sources[at:]
                break
            slots.append(slot)
            source = source._replace(slot=slot)
        with_slots.append(source)
    hot.arrange(chain)
    return with_slots
