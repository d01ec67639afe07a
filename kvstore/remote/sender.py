"""Writes blocks to the remote tier behind everybody's back: a bounded queue that never holds anybody up."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from kvstore.block import Header, checksums, encode_header
from kvstore.errors import TierError
from kvstore.heading import heading
from kvstore.mover import Mover, Priority
from kvstore.remote.block import copy_bytes
from kvstore.remote.breaker import Breaker
from kvstore.remote.cutting import cut, parts_of
from kvstore.remote.options import RemoteOptions
from kvstore.remote.seeker import Seeker
from kvstore.residency import Residency, Resident
from kvstore.tiers.base import Copy, Remote
from kvstore.tiers.seal import Envelope

log = logging.getLogger("kvstore")

MOST_BLOCKS, MOST_BYTES, SHARE = 1024, 1 << 30, 1 / 4  # that wait; and of the host tier's capacity
TOGETHER = 16  # blocks of which it is asked at once whether they are there
# Keys that are known to be there; of their life, and seconds, that pass until they are asked for again when used.
KNOWN, KNOWN_SHARE, KNOWN_SECONDS = 1 << 16, 1 / 4, 600.0


@dataclass(slots=True, eq=False)
class Parcel:
    """A block on its way."""

    number: int
    resident: Resident
    copy: Copy
    envelope: Envelope
    parts: Sequence[memoryview]


class Sender:
    """One per store with a remote tier."""

    def __init__(
        self,
        residency: Residency,
        remote: Remote,
        options: RemoteOptions,
        breaker: Breaker,
        mover: Mover,
        seeker: Seeker,
    ) -> None:
        self._residency, self._remote, self._options = residency, remote, options
        self._breaker, self._mover, self._seeker = breaker, mover, seeker
        self._limit = min(MOST_BYTES, int(residency.host.capacity * SHARE))
        # Guarded by residency.lock:
        self._waiting: OrderedDict[int, Resident] = OrderedDict()  # each holds a lease
        self._moving: dict[int, Resident] = {}  # likewise
        self._bytes = 0  # of both, in slots
        self._known: OrderedDict[bytes, float] = OrderedDict()  # when it was last asked for (time.monotonic)
        self.known_bytes = 0  # payload of these, at most
        residency.share = self.share

    def share(self, chain: Sequence[int]) -> None:
        """A chain was saved, or used: its full blocks that are in memory go to the remote tier, or live on there.
        Locked."""
        index, residents, submit = self._residency.index, self._residency.residents, False
        fresh = time.monotonic() - min(self._options.ttl * KNOWN_SHARE, KNOWN_SECONDS)
        for number in chain:
            resident = residents.get(number)
            if resident is None or number in self._waiting or number in self._moving:
                continue
            layout, kind = resident.layout, index.kind_of(number)
            if not index.count[number] == resident.stride == layout.block_tokens or not kind.fingerprint:
                continue
            if self._known.get(index.key[number], float("-inf")) > fresh:
                continue
            many = len(self._waiting) >= MOST_BLOCKS or self._bytes > max(self._limit - layout.full_slot_bytes, 0)
            if many or not self._breaker.closed:
                self._residency.counters.add("remote_dropped_writes")
                continue
            self._waiting[number] = resident
            self._bytes += layout.full_slot_bytes
            self._residency.hold([number])
            submit = True
        if submit:
            self._mover.submit(Priority.SAVE, (0,), self._run)

    def account(self) -> tuple[int, int]:
        """Blocks that are known to be there, and their bytes, about. Locked."""
        return len(self._known), self.known_bytes

    @property
    def queued(self) -> int:
        """Bytes of blocks that wait or are written. Locked."""
        return self._bytes

    def _run(self) -> None:
        """Worker: takes some blocks that wait, and asks for one more run when others are left."""
        residency, taken = self._residency, list[tuple[int, Resident, Header]]()
        with residency.lock:
            for _ in range(min(TOGETHER, len(self._waiting))):
                number, resident = self._next()
                if residency.residents.get(number) is resident:
                    taken.append((number, resident, heading(residency.index, number, resident.stride)))
                else:
                    self._end([number])
            if self._waiting:
                self._mover.submit(Priority.SAVE, (0,), self._run)
        try:
            if self._breaker.closed:
                self._send([self._parcel(*each) for each in taken])
            elif taken:
                residency.counters.add("remote_dropped_writes", len(taken))
        finally:
            with residency.lock:
                self._end([number for number, _, _ in taken])

    def _next(self) -> tuple[int, Resident]:
        number, resident = self._waiting.popitem(last=False)
        self._moving[number] = resident
        return number, resident

    def _end(self, numbers: Sequence[int]) -> None:
        """The way of these blocks is over. Locked."""
        for number in numbers:
            self._bytes -= self._moving.pop(number).layout.full_slot_bytes
        self._residency.unhold(numbers)
        self._residency.changed.notify_all()

    def _parcel(self, number: int, resident: Resident, header: Header) -> Parcel:
        """A block as it is written. Its lease keeps its slot in place."""
        residency, layout, part_bytes = self._residency, resident.layout, self._options.part_bytes
        payload = residency.host.view(resident.address)[layout.header_bytes : layout.full_slot_bytes]
        for first, last in layout.gaps(resident.stride):  # a slot is recycled: what another left there stays here
            payload[first:last] = bytes(last - first)
        if resident.checksums is None:
            resident.checksums = checksums(layout, resident.stride, payload)
        header.checksums = resident.checksums
        data, life = encode_header(header), self._options.ttl
        if header.expires:
            life = min(life, max(header.expires - residency.wall(), 1.0))
        groups = cut(layout.layer_offsets(resident.stride), part_bytes)
        copy = Copy(header.key, parts_of(groups), copy_bytes(data, layout), life)
        parts = [payload[begin:end] for group in groups for begin, end in group.ranges]
        return Parcel(number, resident, copy, Envelope(data, part_bytes, copy.parts), parts)

    def _send(self, parcels: Sequence[Parcel]) -> None:
        """Of these blocks, writes those that are not there."""
        counters, sent = self._residency.counters, 0
        try:
            there = self._remote.refresh([parcel.copy for parcel in parcels], self._options.timeout) if parcels else []
            for parcel, known in zip(parcels, there, strict=True):
                if not known:
                    if not self._breaker.closed:
                        break
                    self._put(parcel)
                self._arrived(parcel, fresh=not known)
                self._breaker.succeeded()
                sent += 1
        except TierError as error:
            log.warning("blocks are not shared with other hosts: %s", error)
            counters.add("remote_failures")
            self._breaker.failed()
        if sent < len(parcels):
            counters.add("remote_dropped_writes", len(parcels) - sent)

    def _put(self, parcel: Parcel) -> None:
        seconds = self._options.timeout * max(1, -(-parcel.copy.bytes // self._options.part_bytes))
        with self._mover.rates.moving("write", parcel.copy.bytes):
            self._remote.put(parcel.copy, parcel.envelope, parcel.parts, seconds)

    def _arrived(self, parcel: Parcel, fresh: bool) -> None:
        """A block is in the remote tier; if it was forgotten meanwhile, it goes from there again."""
        residency, key = self._residency, parcel.copy.key
        with residency.lock:
            wanted = residency.residents.get(parcel.number) is parcel.resident
            if wanted:
                self._note(key, parcel.resident.payload)
        if not wanted:
            self._remote.drop([parcel.copy], self._options.timeout)
            return
        self._seeker.stored(key)
        if fresh:
            residency.counters.add("remote_written_blocks")
            residency.counters.add("remote_written_bytes", parcel.copy.bytes)

    def _note(self, key: bytes, size: int) -> None:
        if self._known.pop(key, None) is None:
            self.known_bytes += size
        self._known[key] = time.monotonic()
        if len(self._known) > KNOWN:
            self.known_bytes -= self.known_bytes // len(self._known)
            self._known.popitem(last=False)

    def let_go(self, numbers: Collection[int]) -> None:
        """These blocks are about to be forgotten, and no key is known any more. Locked."""
        going = [number for number in self._waiting if number in numbers]
        for number in going:
            self._moving[number] = self._waiting.pop(number)
        self._end(going)
        self._known.clear()
        self.known_bytes = 0

    def flush(self, timeout: float | None) -> bool:
        """Waits until nothing is on its way; False when the time was not enough."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._residency.lock:
            while self._waiting or self._moving:
                left = None if deadline is None else deadline - time.monotonic()
                if (left is not None and left <= 0) or not self._residency.changed.wait(left):
                    return not (self._waiting or self._moving)
        return True

    def abort(self) -> None:
        """The mover is closed and its jobs are gone: what waits is not written."""
        with self._residency.lock:
            while self._waiting:
                self._residency.counters.add("remote_dropped_writes")
                self._end([self._next()[0]])
