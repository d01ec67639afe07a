"""Room for a slot in a tier, made by evicting what may go. The store's lock guards every call."""

from __future__ import annotations

from functools import partial

from kvstore.eviction import victims
from kvstore.families import NONE
from kvstore.residency import Residency

EVICT_AHEAD = 64 << 20  # bytes that make room on disk at once, at most


def reserve_host(residency: Residency, slot_bytes: int) -> int | None:
    """A host slot, evicting what may go; None when leases and unwritten blocks hold the rest. Locked."""
    address = residency.host.reserve(slot_bytes)
    groups = victims(
        slot_bytes, residency.host, residency.host_policy, partial(_host_address, residency), residency.residents
    )
    while address is None and (group := next(groups, None)) is not None:
        for number in group:
            residency.drop_host(number)
        residency.counters.add("host_evicted_blocks", len(group))
        address = residency.host.reserve(slot_bytes)
    if address is None:
        residency.counters.add("host_full")
    return address


def reserve_disk(residency: Residency, slot_bytes: int) -> int | None:
    """A disk slot, evicting what may go. Locked.

    Evicts a little ahead: the tier writes down what it forgot before it writes over it, once for all of these.
    """
    if residency.disk is None:
        return None
    address = residency.disk.reserve(slot_bytes)
    if address is not None:
        return address
    ahead = min(EVICT_AHEAD, residency.disk.capacity // 64)
    numbers = range(len(residency.index.key))
    groups = victims(slot_bytes, residency.disk, residency.disk_policy, partial(_disk_address, residency), numbers)
    while (address is None or ahead > 0) and (group := next(groups, None)) is not None:
        for number in group:
            ahead -= residency.payload(number)
            residency.drop_disk(number)
        residency.counters.add("disk_evicted_blocks", len(group))
        address = residency.disk.reserve(slot_bytes) if address is None else address
    if address is None:
        residency.counters.add("disk_full")
    return address


def _host_address(residency: Residency, number: int) -> int:
    """Host slot of a block that may go from there, or NONE."""
    resident = residency.residents.get(number)
    if resident is None or number in residency.index.leases:
        return NONE
    if resident.clean or residency.disk is None or resident.failed:
        return resident.address
    residency.write_soon(number)  # goes to disk first, and may go from here after that
    return NONE


def _disk_address(residency: Residency, number: int) -> int:
    """Disk slot of a block that may go from there, or NONE."""
    return NONE if number in residency.index.leases else residency.index.disk[number]
