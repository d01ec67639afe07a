"""Which slots of a disk tier are free: the slab over its extents, and the rest that freed slots take.

A freed slot *rests* until the index on the medium has stopped naming it, so that an indexed block is always whole. When
there is no other slot left it is reserved all the same, and its first write has that written down before.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Sequence

from kvstore.files import PAGE, Files
from kvstore.tiers.extents import Extents
from kvstore.tiers.slab import SLOT_BITS, SLOT_MASK, Extent, Slab

MIB = 1 << 20
MIN_EXTENT, MAX_EXTENT = MIB, 256 * MIB
EXTENT_SLOTS = 4  # in an extent at least, so that large blocks do not make a file each
BACK_OFF_SECONDS = 5.0  # after a file could not be made


class Slots:
    """The slots in a folder's extents. The tier's callers hold the store's lock where ``Tier`` says so."""

    def __init__(self, files: Files, folder: str, extents: Extents, capacity: int, budget: int, spare: int) -> None:
        """Adopts the extents that are there. What is not ours among them counts against ``budget``; ``spare`` bytes of
        the filesystem are left to others."""
        self._files, self._folder, self._extents = files, folder, extents
        self._spare = spare
        self.lock = threading.Lock()  # guards all below: erasing and committing run without the store's lock
        size = min(max(capacity // 64, MIN_EXTENT), MAX_EXTENT)
        self.slab = Slab(budget, size, self._grow, self._shrink, overhead=PAGE, least=EXTENT_SLOTS)
        self.taken = 0  # slots in use: as many blocks are in the index, or will be
        self._resting: set[int] = set()
        self._resting_of: Counter[int] = Counter()  # how many of them are of a class
        self._named: set[int] = set()  # freed since the last commit: the index on the medium may name them
        self._refused = files.monotonic() - BACK_OFF_SECONDS
        found = extents.scan()
        self.slab.capacity = max(0, budget - extents.foreign)
        self.slab.skip(extents.highest)
        for extent in found:
            self.slab.adopt(extent)
        self.stale = {extent.number for extent in found}  # extents whose free slots may hold old bytes

    def reserve(self, slot_bytes: int) -> int | None:
        """Address of a free slot, a rested one if there is any."""
        with self.lock:
            if self._extents.failed:
                self._drop_failed()
            address = self.slab.allocate(_whole(slot_bytes))
            if address is None and self._resting:
                self._wake(list(self._resting))
                address = self.slab.allocate(_whole(slot_bytes))
            self.taken += address is not None
            return address

    def _drop_failed(self) -> None:
        """Gives up extents whose file could not be made, once nobody has a slot there."""
        for number in list(self._extents.failed):
            extent = self.slab.extents.get(number)
            if extent is not None:
                self._wake([address for address in self._resting if address >> SLOT_BITS == number])
                if not extent.live:
                    self.slab.drop(extent)
                    self._refused = self._files.monotonic()

    def headroom(self, slot_bytes: int) -> int:
        """Bytes that can be reserved in slots of this class."""
        size = _whole(slot_bytes)
        with self.lock:
            return (self.slab.free_slots(size) + self._resting_of[size]) * size + max(self.slab.room, 0)

    def same_class(self, address: int, slot_bytes: int) -> bool:
        """Whether the slot at ``address`` is of this class."""
        return self.slab.slot_bytes(address) == _whole(slot_bytes)

    def neighbours(self, address: int) -> Sequence[int]:
        """Slots in use in the same extent."""
        with self.lock:
            return [other for other in self.slab.neighbours(address) if other not in self._resting]

    def free(self, address: int) -> None:
        """A slot's block is no more; it rests."""
        with self.lock:
            self.taken -= 1
            self._resting.add(address)
            self._resting_of[self.slab.slot_bytes(address)] += 1
            self._named.add(address)

    def named(self, address: int) -> bool:
        """Whether the index on the medium may still name a block there that is no more."""
        return address in self._named

    def freed(self) -> set[int]:
        """Slots that the next commit ends the rest of."""
        with self.lock:
            return set(self._named)

    def rested(self, addresses: Iterable[int]) -> None:
        """The index on the medium names these no more."""
        with self.lock:
            addresses = set(addresses)
            self._named -= addresses
            self._wake(addresses & self._resting)

    def _wake(self, addresses: Iterable[int]) -> None:
        for address in addresses:
            self._resting.discard(address)
            self._resting_of[self.slab.slot_bytes(address)] -= 1
            self.slab.free(address)
            self.stale.add(address >> SLOT_BITS)

    def place(self, address: int, offset: int, length: int) -> tuple[int, int] | None:
        """Offset in the extent's file, and bytes of the whole slot; None when there is no such place."""
        extent = self.slab.extents.get(address >> SLOT_BITS)
        if extent is None or address & SLOT_MASK >= extent.slots or not 0 <= offset <= extent.slot_bytes - length:
            return None
        return PAGE + (address & SLOT_MASK) * extent.slot_bytes + offset, extent.slot_bytes

    def zero(self, addresses: Iterable[int]) -> None:
        """Zeroes these slots and all free ones that may hold old bytes, durably."""
        with self.lock:
            stale, self.stale = self.stale, set()
            seized = {number: self.slab.seize(number) for number in stale}
        try:
            doomed = {number: list(free) for number, free in seized.items()}
            for address in addresses:
                doomed.setdefault(address >> SLOT_BITS, []).append(address & SLOT_MASK)
            for number, slots in doomed.items():
                extent = self.slab.extents.get(number)
                if extent is not None:
                    self._extents.zero(extent, slots)
        except BaseException:
            with self.lock:
                self.stale |= stale
            raise
        finally:
            with self.lock:
                for number, free in seized.items():
                    self.slab.restore(number, free)

    def _grow(self, extent: Extent) -> bool:
        if self._files.monotonic() - self._refused < BACK_OFF_SECONDS:
            return False
        try:
            free = self._files.space(self._folder).free
        except OSError:
            return False
        if free < extent.bytes + self._extents.planned_bytes + self._spare:
            return False
        self._extents.plan(extent)
        return True

    def _shrink(self, extent: Extent) -> None:
        self._extents.remove(extent.number)
        self.stale.discard(extent.number)


def _whole(size: int) -> int:
    """Rounded up to whole pages."""
    return -(-size // PAGE) * PAGE
