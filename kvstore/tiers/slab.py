"""Slots of equal size in extents, under a byte budget: the allocator of the host tier and of the disk tier.

An extent is a run of slots of one size class. It is grown when a class needs room and the budget has some, and given
back whole when all its slots are free and another class needs the room. An address is extent number and slot number in
one int. Pure bookkeeping: growing and giving back is done by two callbacks. The owner's lock guards every call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

SLOT_BITS = 24
SLOT_MASK = (1 << SLOT_BITS) - 1


@dataclass(slots=True)
class Extent:
    """One run of ``slots`` slots of ``slot_bytes``; ``free`` are unused slot numbers, lowest last."""

    number: int
    slot_bytes: int
    slots: int
    free: list[int] = field(default_factory=list)
    live: set[int] = field(default_factory=set)

    @property
    def bytes(self) -> int:
        """Bytes of all slots."""
        return self.slot_bytes * self.slots


class Slab:
    """Allocates slots; ``grow(extent)`` makes the room (False: it cannot), ``shrink(extent)`` gives it back."""

    def __init__(
        self,
        capacity: int,
        extent_bytes: int,
        grow: Callable[[Extent], bool],
        shrink: Callable[[Extent], None],
        overhead: int = 0,
        least: int = 1,
    ) -> None:
        """``overhead`` bytes are charged per extent beside its slots (a file's header page).

        An extent takes about ``extent_bytes``, but has ``least`` slots where the budget allows.
        """
        self.capacity = capacity
        self.extent_bytes = extent_bytes
        self.used = 0  # bytes of all extents, overhead included; never above capacity
        self.extents: dict[int, Extent] = {}
        self._open: dict[int, list[Extent]] = {}  # class -> extents with a free slot, fullest use last
        self._empty: set[int] = set()  # extents without a live slot
        self._free: Counter[int] = Counter()  # free slots of each class
        self._next = 1
        self._grow = grow
        self._shrink = shrink
        self._overhead = overhead
        self._least = least

    @property
    def room(self) -> int:
        """Bytes left in the budget for the slots of a new extent."""
        return self.capacity - self.used - self._overhead

    def allocate(self, slot_bytes: int) -> int | None:
        """Address of a slot of class ``slot_bytes``, or None when the budget has no room for one."""
        ready = self._open.get(slot_bytes)
        if not ready:
            if not self.extend(slot_bytes):
                return None
            ready = self._open[slot_bytes]
        extent = ready[-1]
        slot = extent.free.pop()
        if not extent.live:
            self._empty.discard(extent.number)
        extent.live.add(slot)
        self._free[slot_bytes] -= 1
        if not extent.free:
            ready.pop()
        return extent.number << SLOT_BITS | slot

    def extend(self, slot_bytes: int) -> bool:
        """Adds an extent for the class; first gives back empty extents of other classes when the budget needs it."""
        if self.room < slot_bytes:
            if not self._empty:
                return False
            self.trim(slot_bytes)
        slots = min(max(self._least, self.extent_bytes // slot_bytes), self.room // slot_bytes, SLOT_MASK)
        if slots < 1:
            return False
        extent = Extent(self._next, slot_bytes, slots, list(range(slots - 1, -1, -1)))
        if not self._grow(extent):
            return False
        self._next += 1
        self.adopt(extent)
        return True

    def trim(self, but: int = 0) -> None:
        """Gives back all empty extents, those of class ``but`` excepted."""
        for extent in [self.extents[number] for number in self._empty]:
            if extent.slot_bytes != but:
                self.drop(extent)

    def adopt(self, extent: Extent) -> None:
        """Takes in an extent that exists already (found at open)."""
        self.extents[extent.number] = extent
        self._next = max(self._next, extent.number + 1)
        self.used += extent.bytes + self._overhead
        if not extent.live:
            self._empty.add(extent.number)
        if extent.free:
            self._open.setdefault(extent.slot_bytes, []).append(extent)
            self._free[extent.slot_bytes] += len(extent.free)

    def claim(self, address: int) -> bool:
        """Marks a given slot as used (at open). False when it is no slot, or used already."""
        extent = self.extents.get(address >> SLOT_BITS)
        slot = address & SLOT_MASK
        if extent is None or slot >= extent.slots or slot in extent.live:
            return False
        extent.live.add(slot)
        self._empty.discard(extent.number)
        return True

    def occupy(self, number: int, slots: set[int]) -> None:
        """Marks many slots of an extent without any in use (at open)."""
        self.extents[number].live = slots
        self._empty.discard(number)

    def cost(self, extent: Extent) -> int:
        """Bytes that the budget is charged for an extent."""
        return extent.bytes + self._overhead

    def settle(self) -> None:
        """After a series of ``claim``: rebuilds the free lists."""
        self._open.clear()
        self._free.clear()
        for extent in self.extents.values():
            extent.free = [slot for slot in range(extent.slots - 1, -1, -1) if slot not in extent.live]
            if extent.free:
                self._open.setdefault(extent.slot_bytes, []).append(extent)
                self._free[extent.slot_bytes] += len(extent.free)

    def free(self, address: int) -> None:
        """Gives a slot back to its extent."""
        extent = self.extents[address >> SLOT_BITS]
        slot = address & SLOT_MASK
        extent.live.remove(slot)
        if not extent.live:
            self._empty.add(extent.number)
        if not extent.free:
            self._open.setdefault(extent.slot_bytes, []).append(extent)
        extent.free.append(slot)
        self._free[extent.slot_bytes] += 1

    def seize(self, number: int) -> list[int]:
        """Takes all free slots of an extent out of use, until ``restore``; returns their numbers."""
        extent = self.extents.get(number)
        if extent is None or not extent.free:
            return []
        taken, extent.free = extent.free, []
        self._open[extent.slot_bytes].remove(extent)
        self._free[extent.slot_bytes] -= len(taken)
        return taken

    def restore(self, number: int, slots: list[int]) -> None:
        """Makes seized slots free again; the extent may be gone by now."""
        extent = self.extents.get(number)
        if extent is not None and slots:
            if not extent.free:
                self._open.setdefault(extent.slot_bytes, []).append(extent)
            extent.free += slots
            self._free[extent.slot_bytes] += len(slots)

    def skip(self, number: int) -> None:
        """Numbers of new extents are above this one."""
        self._next = max(self._next, number + 1)

    def drop(self, extent: Extent) -> None:
        """Gives an extent without live slots back."""
        assert not extent.live
        del self.extents[extent.number]
        self._empty.discard(extent.number)
        if extent.free:  # none: they are seized
            self._open[extent.slot_bytes].remove(extent)
            self._free[extent.slot_bytes] -= len(extent.free)
        self.used -= extent.bytes + self._overhead
        self._shrink(extent)

    def slot_bytes(self, address: int) -> int:
        """Size class of the slot at ``address``."""
        return self.extents[address >> SLOT_BITS].slot_bytes

    def offset(self, address: int) -> int:
        """Byte offset of the slot in its extent."""
        return (address & SLOT_MASK) * self.slot_bytes(address)

    def neighbours(self, address: int) -> Sequence[int]:
        """Addresses of all used slots in the same extent."""
        extent = self.extents[address >> SLOT_BITS]
        return [extent.number << SLOT_BITS | slot for slot in extent.live]

    def free_slots(self, slot_bytes: int) -> int:
        """Number of free slots of a class."""
        return self._free[slot_bytes]
