"""The host tier: slots in anonymous memory, by size class, touched a little ahead of use.

First touch of a fresh page costs ten times what writing to a recycled one costs, so a thread keeps some touched slots
of each class in reserve, and slots are recycled before new memory is taken. Staging buffers, blocks that wait for the
disk and blocks that were read from it all live here: one account for all memory.

For a device that copies from here the same thread pins what it has touched. What cannot be pinned stays pageable, which
is slower and nothing else.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import logging
import mmap
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from kvstore.block import address_of
from kvstore.errors import BadInput
from kvstore.tiers.base import Pins
from kvstore.tiers.slab import SLOT_BITS, Extent, Slab

log = logging.getLogger("kvstore")

MIN_EXTENT = 1 << 20
MAX_EXTENT = 256 << 20
MAX_PIN = 1 << 30  # bytes pinned in one call; larger ones fail on some machines
LOOK_AHEAD = 4  # a class grows early when fewer than a LOOK_AHEAD-th of an extent's slots are free
_MADV_POPULATE_WRITE = 23
_memset = ctypes.memset
# Through ctypes, because mmap.madvise keeps the interpreter's lock while the kernel works.
madvise = ctypes.CDLL(None).madvise
madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def memory_limit() -> int:
    """Bytes that this process may use: the cgroup's limit or the machine's memory, whichever is smaller."""
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(name).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            limit = min(limit, int(text))
    return limit


class Memory(Protocol):
    """Where a host tier has its extents from. Called under the lock that guards the tier."""

    def map(self, number: int, size: int) -> mmap.mmap | None:
        """Memory for the extent of this number; None: there is no more."""

    def retire(self, number: int) -> None:
        """The tier has let go of it."""


class Anonymous:
    """Memory of this process alone."""

    def map(self, number: int, size: int) -> mmap.mmap | None:
        """See ``Memory``."""
        try:
            return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, ValueError):
            return None

    def retire(self, number: int) -> None:
        """It goes with its last view."""


class HostTier:
    """Slots in memory. ``reserve`` and ``free`` are called under the store's lock; views may be used without it."""

    def __init__(
        self, capacity: int, pins: Pins | None = None, memory: Memory | None = None, touch: bool = True
    ) -> None:
        """``memory`` maps each extent; ``touch``: its pages are mapped ahead of use, by a thread.

        Raises ``BadInput`` when ``capacity`` bytes cannot be had on this machine."""
        self.check(capacity)
        extent = min(max(capacity // 16, MIN_EXTENT), MAX_EXTENT)
        self._memory: dict[int, tuple[mmap.mmap, memoryview, int]] = {}  # extent -> mapping, its bytes, base address
        self._slab = Slab(capacity, extent, self._grow, self._shrink)
        self._toucher: threading.Thread | None = None
        self._source, self._touches = memory or Anonymous(), touch
        self._pins = pins
        self._pinned: dict[int, list[tuple[int, int]]] = {}  # extent -> what is pinned of it; the thread's own
        self._complained = False  # the thread's own, too
        self._wake = threading.Condition()  # guards the fields below
        self._untouched: list[Extent] = []
        self._leaving: list[tuple[int, mmap.mmap]] = []  # extents that are to be unpinned, and kept in place until then
        self._pinned_bytes = 0
        self._closed = False

    @staticmethod
    def check(capacity: int) -> None:
        """Raises ``BadInput`` when ``capacity`` bytes cannot be had on this machine."""
        if capacity > (limit := memory_limit()):
            raise BadInput(
                f"host={capacity} bytes is more than the {limit} bytes of memory here; choose a smaller size"
            )

    @property
    def slab(self) -> Slab:
        """The allocator, for who moves blocks between its extents."""
        return self._slab

    @property
    def capacity(self) -> int:
        """Byte budget; when it is made smaller, what is used is too much until it is given back."""
        return self._slab.capacity

    @capacity.setter
    def capacity(self, size: int) -> None:
        self._slab.capacity = size

    @property
    def used(self) -> int:
        """Bytes of all extents."""
        return self._slab.used

    def gauges(self) -> dict[str, int]:
        """``host_pinned_bytes`` and ``host_pageable_bytes``: how much of ``used`` the device copies by itself."""
        with self._wake:
            return {
                "host_pinned_bytes": self._pinned_bytes,
                "host_pageable_bytes": max(self.used - self._pinned_bytes, 0),
            }

    def reserve(self, slot_bytes: int) -> int | None:
        """Address of a free slot of this class, or None when there is no room. Never evicts."""
        address = self._slab.allocate(slot_bytes)
        if address is not None:
            extent = self._slab.extents[address >> SLOT_BITS]
            low = len(extent.free) * LOOK_AHEAD < extent.slots and self._slab.room >= slot_bytes
            if low and self._slab.free_slots(slot_bytes) * LOOK_AHEAD < extent.slots:
                self._slab.extend(slot_bytes)
        return address

    def expect(self, slot_bytes: int) -> None:
        """Slots of this class will be wanted: the first of them are touched from now on, if there are none yet."""
        if not self._slab.free_slots(slot_bytes) and self._slab.room >= slot_bytes:
            self._slab.extend(slot_bytes)

    def headroom(self, slot_bytes: int) -> int:
        """Bytes that ``reserve`` can give in slots of this class before something must go."""
        slots = self._slab.free_slots(slot_bytes) + max(self._slab.room, 0) // slot_bytes
        return slots * slot_bytes

    def free(self, address: int) -> None:
        """Gives a slot back."""
        self._slab.free(address)

    def same_class(self, address: int, slot_bytes: int) -> bool:
        """Whether freeing ``address`` makes room for a slot of class ``slot_bytes``."""
        return self._slab.slot_bytes(address) == slot_bytes

    def neighbours(self, address: int) -> Sequence[int]:
        """Used slots in the same extent."""
        return self._slab.neighbours(address)

    def view(self, address: int) -> memoryview:
        """The slot's bytes; aligned to pages when the class is a multiple of them."""
        _, data, _ = self._memory[address >> SLOT_BITS]
        offset = self._slab.offset(address)
        return data[offset : offset + self._slab.slot_bytes(address)]

    def pointer(self, address: int) -> int:
        """Memory address of the slot's first byte."""
        return self._memory[address >> SLOT_BITS][2] + self._slab.offset(address)

    def offset(self, address: int) -> int:
        """Where the slot begins in its extent, whose number is in the address."""
        return self._slab.offset(address)

    def trim(self) -> None:
        """Gives back extents without a slot in use."""
        self._slab.trim()

    def erase(self, address: int) -> None:
        """Overwrites a slot with zeros."""
        _memset(self.pointer(address), 0, self._slab.slot_bytes(address))

    def close(self) -> None:
        """Stops the thread and lets go of the memory; views that are still held keep theirs alive."""
        self._end()
        atexit.unregister(self._end)
        self._memory.clear()

    def _end(self) -> None:
        """Also when the interpreter ends: a thread that went on to pin would abort the process."""
        if self._toucher is None or not self._toucher.is_alive():  # so it is in the child of a fork
            return
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._toucher.join()

    def _grow(self, extent: Extent) -> bool:
        mapping = self._source.map(extent.number, extent.bytes)
        if mapping is None:
            return False
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without huge pages: the memory works all the same
                mapping.madvise(mmap.MADV_HUGEPAGE)
        if self._pins is not None:
            # Shared with a child, a page that this process writes to would be another one, and the device, which knows
            # the pinned one, would go on with that.
            mapping.madvise(mmap.MADV_DONTFORK)
        self._memory[extent.number] = (mapping, memoryview(mapping), address_of(mapping))
        if not self._touches:
            return True
        with self._wake:
            self._untouched.append(extent)
            if self._toucher is None:
                toucher = threading.Thread(target=self._touch, name="kvstore-toucher", daemon=True)
                try:
                    toucher.start()
                    self._toucher = toucher
                    atexit.register(self._end)
                except RuntimeError as error:  # pages are mapped by their first use; the next extent tries again
                    log.warning("no thread touches memory ahead of its use: %s", error)
            self._wake.notify()
        return True

    def _shrink(self, extent: Extent) -> None:
        entry = self._memory.pop(extent.number, None)
        self._source.retire(extent.number)
        with self._wake:
            if extent in self._untouched:
                self._untouched.remove(extent)
            elif self._pins is not None and entry is not None and not self._closed:
                self._leaving.append((extent.number, entry[0]))
                self._wake.notify()

    def _touch(self) -> None:
        """Has the kernel map the pages of new extents. No byte changes, so slots may be in use meanwhile."""
        extent: Extent | None = None
        while True:
            with self._wake:
                while not (self._untouched or self._leaving or self._closed):
                    self._wake.wait()
                closed, leaving, self._leaving = self._closed, self._leaving, []
                extent = self._untouched.pop(0) if self._untouched and not closed else None
                entry = self._memory.get(extent.number) if extent is not None else None
            for number in list(self._pinned) if closed else [number for number, _ in leaving]:
                self._unpin(number)
            leaving.clear()
            if closed:
                return
            if extent is not None and entry is not None:
                self._populate(entry[2], len(entry[1]))
                self._pin(extent, entry[2])
            entry = None  # it may be given back while this thread waits

    def _populate(self, base: int, size: int) -> None:
        step = 8 << 20
        for start in range(0, size, step):
            with self._wake:
                if self._closed:
                    return
            if madvise(base + start, min(step, size - start), _MADV_POPULATE_WRITE):
                return  # a kernel without it (before 5.14): pages are mapped by their first use

    def _pin(self, extent: Extent, base: int) -> None:
        """In runs of whole slots: a copy that lies in two runs would fail."""
        step = MAX_PIN // extent.slot_bytes * extent.slot_bytes
        if self._pins is None or not step:
            return
        pinned = self._pinned[extent.number] = []
        for start in range(0, extent.bytes, step):
            size = min(step, extent.bytes - start)
            with self._wake:
                if self._closed:
                    return
            if self._pins.pin(base + start, size):
                pinned.append((base + start, size))
                with self._wake:
                    self._pinned_bytes += size
            elif not self._complained:
                self._complained = True
                log.warning("host memory cannot be pinned and stays pageable, at first %d bytes", size)

    def _unpin(self, number: int) -> None:
        for address, size in self._pinned.pop(number, ()):
            assert self._pins is not None
            self._pins.unpin(address)
            with self._wake:
                self._pinned_bytes -= size
