"""The budget of host memory, changed while the store is used.

Memory is given back extent by extent. What stands in one moves to slots that are free elsewhere, and the blocks that
are worth least go for it. What leases hold, and drafts, are not touched: their extents wait until they are let go.
"""

from __future__ import annotations

import time

from kvstore.errors import BadInput
from kvstore.residency import Residency
from kvstore.room import least
from kvstore.tiers.slab import SLOT_BITS, Extent

AGAIN = 0.02  # seconds between two looks at what leases and writes still hold


def resize(residency: Residency, capacity: int, timeout: float) -> int:
    """See ``LocalStore.resize``. Others get the lock between two extents."""
    host, until = residency.host, time.monotonic() + timeout
    with residency.lock:
        residency.check_open()
        residency.settle()
        host.check(capacity)
        if kept := residency.keeping.resize("host", capacity):
            raise BadInput(f"pins keep {kept} bytes in memory, which is too much for it; let them end, or give more")
        host.capacity = capacity
    while True:
        with residency.lock:
            if residency.closed or not over(residency) or time.monotonic() > until:
                return host.used
            if not _shrink(residency):
                residency.changed.wait(AGAIN)


def settle(residency: Residency) -> None:
    """Goes on where ``resize`` had to leave it."""
    if residency.host.used > residency.host.capacity:
        with residency.lock:
            while over(residency) and _shrink(residency):
                pass


def over(residency: Residency) -> bool:
    """Whether more memory is taken than may be, when all is given back that nothing is in. Locked."""
    host = residency.host
    residency.settle()
    if host.used > host.capacity:
        host.trim()
    return host.used > host.capacity


def _shrink(residency: Residency) -> bool:
    """Gives back the emptiest extent of those that can be emptied; whether there was one. Locked."""
    slab, leases = residency.host.slab, residency.index.leases
    free = {resident.address: number for number, resident in residency.residents.items() if number not in leases}
    for extent in sorted(slab.extents.values(), key=lambda extent: len(extent.live) / extent.slots):
        places = [extent.number << SLOT_BITS | slot for slot in extent.live]
        if all(place in free for place in places) and _vacate(residency, extent, [free[place] for place in places]):
            return True
    return False


def _vacate(residency: Residency, extent: Extent, members: list[int]) -> bool:
    """Blocks leave an extent, and it is given back; False where that cannot be now. Locked."""
    slab = residency.host.slab
    taken = slab.seize(extent.number)  # nothing moves within it
    missing = len(members) - slab.free_slots(extent.slot_bytes)
    going = least(residency, extent.slot_bytes, missing) if missing > 0 else []
    if len(going) < missing:
        slab.restore(extent.number, taken)
        return False
    residency.uses.evicted("host", going)
    for number in going:
        residency.drop_host(number)
    residency.counters.add("host_evicted_blocks", len(going))
    slab.seize(extent.number)  # what has become free of it
    staying = [residency.residents[number] for number in members if number in residency.residents]
    places = [slab.allocate(extent.slot_bytes) for _ in staying]  # all, before the first of their own becomes free
    for resident, place in zip(staying, places, strict=True):
        assert place is not None
        residency.host.view(place)[:] = residency.host.view(resident.address)
        residency.host.free(resident.address)
        resident.address = place
    slab.drop(extent)
    return True
