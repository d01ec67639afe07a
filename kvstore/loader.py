"""Starts loads: what a match found is brought from disk to host memory, layer 0 of all blocks first, and checked."""

from __future__ import annotations

import logging
import time
import weakref

from kvstore.block import bad_pieces, decode_header
from kvstore.errors import Corrupt, TierError
from kvstore.families import NONE
from kvstore.fetch import Fetch
from kvstore.hot import Hold, Hot, Slot
from kvstore.keys import TOKEN_BYTES
from kvstore.lease import Lease
from kvstore.load import Load, Source
from kvstore.match import Match
from kvstore.mover import Mover, Priority
from kvstore.residency import Residency, Resident
from kvstore.room import reserve_host
from kvstore.tensors.streams import ThreadStream

log = logging.getLogger("kvstore")

LEASE_SHARE = 0.75  # of the host tier's capacity that leases may hold


class Loader:
    """Starts fetches and settles them. One per store."""

    def __init__(self, residency: Residency, mover: Mover) -> None:
        self._residency = residency
        self._mover = mover
        self._fetches: dict[int, Fetch] = {}  # guarded by residency.lock
        self._worker: ThreadStream | None = None  # likewise
        self._holds: weakref.WeakSet[Hold] = weakref.WeakSet()  # of loads that streams may still work for

    def load(self, match: Match, device: bool = False) -> Load:
        """Starts bringing a match's blocks to host memory; takes over its lease (of two loads, the first). Any thread.

        With ``device``, blocks that are on the device need no bringing, and others get a slot there, if there is room.
        """
        residency = self._residency
        sources: list[Source] = []
        started: list[Fetch] = []
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
            room = int(residency.host.capacity * LEASE_SHARE) - residency.leased_bytes()
            for number, tokens in match.blocks if lease.active else ():  # else others may have the numbers by now
                slot = hot.find(number) if hot is not None else None
                held: Resident | Fetch | None = None
                if slot is not None:
                    slots.append(slot)
                else:
                    held = residency.residents.get(number) or self._fetches.get(number)
                    if held is None:
                        room -= match.layout.full_slot_bytes
                        held = self._start(number) if room >= 0 else None
                        if held is None:
                            residency.counters.add("loads_cut")
                            break
                        started.append(held)
                piece = match.token_ids[position : position + tokens * TOKEN_BYTES]
                if not self._promises(held, number, piece):
                    break
                position += len(piece)
                sources.append(Source(number, tokens, held, self._view(held), slot))
            # Known to the policy from the start, so that one touch of the chain puts all of it in order.
            for fetch in started:
                residency.host_policy.insert(fetch.number, fetch.resident.payload)
            residency.host_policy.touch([number for number, _ in match.blocks])
            if hot is not None:
                sources = _placed(sources, hot, slots)
            hold = Hold(lease, slots)
            self._holds.add(hold)
        for order, fetch in enumerate(started):
            self._submit(fetch, 0, order)
        return Load(match, sources, residency, hold)

    def _view(self, held: Resident | Fetch | None) -> memoryview | None:
        if held is None:
            return None
        return held.view if isinstance(held, Fetch) else self._residency.host.view(held.address)

    def _start(self, number: int) -> Fetch | None:
        residency, index = self._residency, self._residency.index
        address, stride = index.disk[number], index.stride[number]
        if address == NONE:
            return None
        layout = index.kind_of(number).layout
        slot = reserve_host(residency, layout.class_bytes(stride))
        if slot is None:
            return None
        resident = Resident(slot, layout, stride, residency.payload(number), clean=True)
        fetch = Fetch(number, resident, residency.host.view(slot), address, layout.header_bytes)
        residency.hold([number])
        self._fetches[number] = fetch
        return fetch

    def _promises(self, source: Resident | Fetch | None, number: int, piece: bytes) -> bool:
        """Whether the block starts with these tokens; of one under way its header will tell, or fail it. Locked.

        The key says so already. A hash that is broken must cost hits and never give wrong bytes.
        """
        if not isinstance(source, Fetch):
            return self._residency.index.tokens_of(number).startswith(piece)
        source.promised.append(piece)
        return source.header is None or source.header.tokens.startswith(piece)

    def _submit(self, fetch: Fetch, part: int, order: int) -> None:
        if not self._mover.submit(Priority.DEMAND, (part, order), lambda: self._run(fetch, part, order)):
            fetch.cancel()  # the store is closing: ``abort`` settles it

    def _run(self, fetch: Fetch, part: int, order: int) -> None:
        first, last = fetch.parts[part]
        try:
            if not fetch.failed:
                begin = time.perf_counter()
                self._read(fetch, part)
                fetch.took(part, begin, time.perf_counter())
                fetch.arrive(first, last)
        except TierError as error:
            self._fail(fetch, error)
        except BaseException:  # a bug; whoever waits must not wait for ever
            fetch.fail()
            raise
        finally:
            if part == 0:
                for following in range(1, len(fetch.parts)):
                    self._submit(fetch, following, order)
            if fetch.part_over():
                self._settle(fetch)

    def _fail(self, fetch: Fetch, error: TierError) -> None:
        """A part could not be read or is not what was written: waiters learn it at once."""
        if fetch.fail():
            kind = "corrupt_blocks" if isinstance(error, Corrupt) else "failed_reads"
            self._residency.counters.add(kind)
            log.warning("a block on disk is dropped: %s", error)

    def worker(self) -> ThreadStream:
        """The thread that brings layers to engines ahead of their asking; started by the first who asks. Any thread."""
        with self._residency.lock:
            self._residency.check_open()
            if self._worker is None:
                self._worker = ThreadStream("kvstore-ahead", tells=False)
            return self._worker

    def close(self) -> None:
        """The mover is closed: what waits for it fails, the worker's thread ends, and streams have done what was asked
        of them for loads: the memory that they work on goes next."""
        self.abort()
        if self._worker is not None:
            self._worker.close()
        for hold in list(self._holds):
            for event in list(hold.events):
                try:
                    event.wait()
                except RuntimeError as error:
                    log.warning("the device has failed, and works on no memory any more: %s", error)

    def abort(self) -> None:
        """The mover is closed and its jobs are gone: fetches that have not settled fail now."""
        with self._residency.lock:
            left = list(self._fetches.values())
        for fetch in left:
            fetch.cancel()
            self._settle(fetch)

    def _read(self, fetch: Fetch, part: int) -> None:
        """Reads one part (the first with the header) into the slot and checks every piece of it."""
        tier = self._residency.disk
        assert tier is not None
        first, last = fetch.parts[part]
        begin = 0 if part == 0 else fetch.header_bytes + fetch.offsets[first]
        end = fetch.header_bytes + fetch.offsets[last]
        tier.read(fetch.address, begin, fetch.view[begin:end])
        self._residency.counters.add("disk_read_bytes", end - begin)
        if part == 0:
            self._check_header(fetch)
        assert fetch.header is not None
        payload = fetch.view[fetch.header_bytes :]
        bad = next(bad_pieces(fetch.header, payload, first, last), None)
        if bad is not None:
            raise Corrupt(f"checksum of layer {bad[0]} differs")

    def _check_header(self, fetch: Fetch) -> None:
        header = decode_header(fetch.view[: fetch.header_bytes])
        residency = self._residency
        with residency.lock:
            index, number = residency.index, fetch.number
            kind = index.kind_of(number)
            expected = (index.key[number], kind.namespace, kind.layout, fetch.resident.stride, index.count[number])
            fetch.header = header
            kept = all(header.tokens.startswith(piece) for piece in fetch.promised)
        if not kept or (header.key, header.namespace, header.layout, header.stride, header.token_count) != expected:
            raise Corrupt("the slot holds another block than the index says")

    def _settle(self, fetch: Fetch) -> None:
        """No part runs any more. The block is resident, or a miss from now on.

        A reader may still copy layers that came in well from the slot of a fetch that failed later, so that slot goes
        back with the last lease on the block, not before.
        """
        residency, number, resident = self._residency, fetch.number, fetch.resident
        with residency.lock:
            del self._fetches[number]
            still_there = residency.index.disk[number] == fetch.address
            if still_there and not fetch.failed and fetch.header is not None:
                resident.checksums = fetch.header.checksums
                residency.put_host(number, resident, fetch.header.tokens)
            else:
                residency.host_policy.remove(number)
                residency.keep_until_unleased(number, resident)
                if still_there and not fetch.cancelled:
                    residency.drop_disk(number)
            residency.unhold([number])
            residency.changed.notify_all()


def _placed(sources: list[Source], hot: Hot, slots: list[Slot]) -> list[Source]:
    """The sources with slots for those that have none, as far as there is room; ``slots`` gets the new ones. Locked."""
    chain = [source.number for source in sources]
    hot.touch(chain)  # so that no block makes room for another of the same prompt, if others can
    placed = []
    for at, source in enumerate(sources):
        if source.held is not None and not hot.placed(source.number):
            held = source.held.resident if isinstance(source.held, Fetch) else source.held
            slot = hot.place(source.number, held.layout, held.stride)
            if slot is None:
                placed += sources[at:]
                break
            slots.append(slot)
            source = source._replace(slot=slot)
        placed.append(source)
    hot.touch(chain)
    return placed
