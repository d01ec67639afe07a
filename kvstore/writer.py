"""Writes blocks to disk behind everybody's back: checksums, header, one write each, and durable in groups."""

from __future__ import annotations

import ctypes
import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from kvstore.block import Header, address_of, checksums, encode_header
from kvstore.errors import TierError
from kvstore.families import NONE
from kvstore.heading import heading
from kvstore.layout import Layout
from kvstore.mover import Mover, Priority
from kvstore.residency import Residency, Resident
from kvstore.room import reserve_disk, step_down
from kvstore.scratch import Scratch

log = logging.getLogger("kvstore")

COMMIT_BLOCKS, COMMIT_BYTES = 128, 256 << 20  # of written blocks that become durable together, at most


@dataclass(frozen=True, slots=True)
class Durable:
    """What of a save would survive a restart now: leading tokens of the chain, and the save's own blocks and bytes."""

    tokens: int
    blocks: int
    bytes: int


@dataclass(slots=True)
class Written:
    """A block whose slot is on disk, but not yet in the disk tier's index."""

    number: int
    resident: Resident
    address: int
    header: Header


class Writer:
    """The queue of blocks that are to go to disk. One per store."""

    def __init__(self, residency: Residency, mover: Mover) -> None:
        self._residency = residency
        self._mover = mover
        residency.write_soon = self.enqueue
        self._scratch = Scratch()
        # Guarded by residency.lock:
        self._queued: set[int] = set()  # blocks that wait, are written or are made durable; each holds a lease
        self._written: list[Written] = []  # on disk, not yet durable
        self._written_bytes = 0
        self._committing = 0  # blocks in commits that run

    def enqueue(self, number: int) -> None:
        """Queues a block for its disk write, once, and what it stands behind: nobody would find it without. Locked."""
        while number >= 0 and self._queue(number):
            number = self._residency.index.parent[number]

    def _queue(self, number: int) -> bool:
        """Whether the block was queued just now."""
        residency = self._residency
        if not self.writable(number):
            return False
        if not self._mover.submit(Priority.SAVE, (residency.index.sequence[number],), lambda: self._write(number)):
            return False
        self._queued.add(number)
        residency.hold([number])
        return True

    @property
    def queued(self) -> int:
        """How many blocks wait, are written or are made durable. Locked."""
        return len(self._queued)

    def writable(self, number: int) -> bool:
        """Whether the block is in memory only, waits for no write, and might be written. Locked."""
        resident = self._residency.residents.get(number)
        if self._residency.disk is None or resident is None or number in self._queued:
            return False
        return not (resident.clean or resident.failed)

    def _write(self, number: int) -> None:
        """Worker: one block to disk, and every so often what was written into the index."""
        residency = self._residency
        with residency.lock:
            resident = residency.residents.get(number)
            address = None
            if resident is not None and not resident.clean and not resident.failed:
                header = self._header(number, resident)
                address = reserve_disk(residency, resident.layout.class_bytes(header.stride))
        written = None
        if resident is not None and address is not None:
            written = self._write_slot(number, resident, address, header)
        with residency.lock:
            if written is not None:
                self._written.append(written)
                self._written_bytes += written.header.slot_bytes
            else:
                self._give_up(number, resident)
            batch: list[Written] = []
            full = len(self._written) >= COMMIT_BLOCKS or self._written_bytes >= COMMIT_BYTES
            if full or len(self._queued) == len(self._written) + self._committing:
                batch, self._written, self._written_bytes = self._written, [], 0
                self._committing += len(batch)
        if batch:
            self._commit(batch)

    def _header(self, number: int, resident: Resident) -> Header:
        """Header of a block as it will stand on disk, checksums missing. Locked."""
        count = self._residency.index.count[number]
        stride = count if count < resident.layout.block_tokens else resident.stride
        return heading(self._residency.index, number, stride)

    def _write_slot(self, number: int, resident: Resident, address: int, header: Header) -> Written | None:
        """Checksums, header, one write. The block's lease keeps its host slot in place meanwhile."""
        residency = self._residency
        layout, size = resident.layout, resident.layout.slot_bytes(header.stride)
        view = residency.host.view(resident.address)
        assert residency.disk is not None
        vault, tight = residency.disk.vault, header.stride != resident.stride
        try:
            with self._scratch.lend(size) if tight or vault is not None else nullcontext(view) as scratch:
                slot = self._compact(view, scratch, resident, header.stride) if tight else view[:size]
                payload = slot[layout.header_bytes : size]
                known = None if tight else resident.checksums
                header.checksums = known or checksums(layout, header.stride, payload)
                if vault is not None:
                    header, slot = vault.seal(header, payload, scratch[layout.header_bytes :]), scratch
                data = encode_header(header)
                slot[: len(data)] = data
                _blank(slot, layout, header.stride, len(data))
                with self._mover.rates.moving("write", size):
                    residency.disk.write(address, slot)
        except TierError as error:
            log.warning("a block could not be written to disk: %s", error)
            with residency.lock:
                self._unwrite(number, resident, address, header.sequence)
            return None
        residency.counters.add("disk_written_bytes", size)
        return Written(number, resident, address, header)

    def _compact(self, view: memoryview, slot: memoryview, resident: Resident, stride: int) -> memoryview:
        """A partial block's slot without the room that its draft had left, in ``slot``."""
        layout = resident.layout
        source, target = address_of(view) + layout.header_bytes, address_of(slot) + layout.header_bytes
        for wide, tight in zip(layout.pieces(resident.stride), layout.pieces(stride), strict=True):
            ctypes.memmove(target + tight.offset, source + wide.offset, tight.length)
        return slot

    def _commit(self, batch: list[Written]) -> None:
        """Makes written blocks durable and indexed; then they count as on disk."""
        residency = self._residency
        assert residency.disk is not None
        error: TierError | None = None
        with residency.lock:  # what was forgotten meanwhile is not even indexed
            alive = [w for w in batch if residency.residents.get(w.number) is w.resident]
        try:
            residency.disk.commit([(w.address, w.header) for w in alive])
        except TierError as failure:
            error = failure
            log.warning("%d blocks could not be made durable: %s", len(batch), failure)
        with residency.lock:
            self._committing -= len(batch)
            stored: list[int] = []
            for w in batch:
                same = residency.residents.get(w.number) is w.resident
                if error is None and same:
                    w.resident.clean = True
                    residency.put_disk(w.number, w.address, w.header.stride)
                    stored.append(w.number)
                elif error is None:  # the block was forgotten or superseded meanwhile
                    residency.abandon_disk(w.address, w.header.sequence)
                else:
                    self._unwrite(w.number, w.resident, w.address, w.header.sequence)
                if error is None:
                    self._leave_queue(w.number, w.resident)
                else:
                    self._give_up(w.number, w.resident)
            parents = {residency.index.parent[number] for number in stored}
            for number in stored:
                if number not in parents:  # the last of its chain here: all before it is in its chain
                    residency.disk_policy.arrange(residency.index.chain(number))
            residency.counters.add("disk_written_blocks", len(stored))

    def _unwrite(self, number: int, resident: Resident, address: int, sequence: int) -> None:
        """A write or a commit failed: the slot goes back, erased when its block was forgotten meanwhile. Locked."""
        residency = self._residency
        assert residency.disk is not None
        if residency.residents.get(number) is resident:
            residency.disk.forget([sequence])  # who knows how far the commit came
            residency.disk.free(address)
        else:
            residency.abandon_disk(address, sequence)

    def _give_up(self, number: int, resident: Resident | None) -> None:
        """The block stays in memory only. Locked."""
        if resident is not None and not resident.clean:
            resident.failed = True
            self._residency.counters.add("failed_writes")
        self._leave_queue(number, resident)

    def _leave_queue(self, number: int, resident: Resident | None) -> None:
        """This write of a block is over; one that was saved anew meanwhile takes its place. Locked."""
        residency = self._residency
        self._queued.discard(number)
        if residency.residents.get(number) is not resident:
            self.enqueue(number)
        residency.unhold([number])
        if resident is not None and resident.demoted and residency.residents.get(number) is resident:
            step_down(residency, number)
        residency.changed.notify_all()

    def abort(self) -> None:
        """The mover is closed and its jobs are gone: what is on disk becomes durable, the rest stays unwritten."""
        residency = self._residency
        with residency.lock:
            batch, self._written, self._written_bytes = self._written, [], 0
            self._committing += len(batch)
        if batch:
            self._commit(batch)
        with residency.lock:
            for number in list(self._queued):
                self._give_up(number, residency.residents.get(number))

    # -- waiting -----------------------------------------------------------------------------------------------

    def wait(self, chain: Sequence[tuple[int, int, int]], new: set[int], timeout: float | None) -> Durable:
        """Has the blocks of a chain written, waits until each is durable or has failed."""
        residency, index = self._residency, self._residency.index
        deadline = None if timeout is None else time.monotonic() + timeout
        with residency.lock:
            for number, sequence, _ in chain:
                if index.sequence[number] == sequence:
                    self.enqueue(number)
            for number, sequence, _ in chain:
                while number in self._queued and index.sequence[number] == sequence:
                    left = None if deadline is None else deadline - time.monotonic()
                    if (left is not None and left <= 0) or not residency.changed.wait(left):
                        break
            tokens = blocks = size = 0
            leading = True
            for number, sequence, used in chain:
                durable = index.sequence[number] == sequence and index.disk[number] != NONE
                leading = leading and durable
                tokens += used if leading else 0
                if durable and number in new:
                    blocks += 1
                    size += residency.payload(number)
        return Durable(tokens, blocks, size)

    def flush(self, timeout: float | None) -> bool:
        """Has every unwritten block written; False when the time was not enough."""
        residency = self._residency
        deadline = None if timeout is None else time.monotonic() + timeout
        with residency.lock:
            for number in list(residency.residents):
                self.enqueue(number)
            while self._queued:
                left = None if deadline is None else deadline - time.monotonic()
                if (left is not None and left <= 0) or not residency.changed.wait(left):
                    return not self._queued
        return True


def _blank(slot: memoryview, layout: Layout, stride: int, used: int) -> None:
    """Zeroes what lies between the pieces: a slot is recycled, and another's tokens must not go to disk with this."""
    slot[used : layout.header_bytes] = bytes(layout.header_bytes - used)
    for first, last in layout.gaps(stride):
        slot[layout.header_bytes + first : layout.header_bytes + last] = bytes(last - first)
