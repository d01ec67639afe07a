"""Room for a slot in a tier, made by evicting what may go. The store's lock guards every call."""

from __future__ import annotations

from functools import partial

from kvstore.eviction import victims
from kvstore.families import NONE
from kvstore.residency import Residency

EVICT_AHEAD = 512 << 20  # bytes that are kept free on disk at most, so that a write finds a slot that is ready


def reserve_host(residency: Residency, slot_bytes: int) -> int | None:
    """A host slot, evicting what may go; None when leases and unwritten blocks hold the rest. Locked."""
    found = reserve_hosts(residency, slot_bytes, 1)
    return found[0] if found else None


def reserve_hosts(residency: Residency, slot_bytes: int, count: int) -> list[int]:
    """Up to ``count`` host slots, evicting what may go. Locked."""
    host, found, evicted = residency.host, list[int](), 0
    while len(found) < count and (address := host.reserve(slot_bytes)) is not None:
        found.append(address)
    if len(found) == count:
        return found
    address_of = partial(_host_address, residency)
    for group in victims(slot_bytes, host, residency.host_policy, address_of, residency.residents):
        evicted += len(group)
        if len(group) == 1 and host.same_class(residency.residents[group[0]].address, slot_bytes):
            found.append(residency.take_host(group[0]))  # one slot for another of its class, without a detour
        else:
            for number in group:
                residency.drop_host(number)
            while len(found) < count and (address := host.reserve(slot_bytes)) is not None:
                found.append(address)
        if len(found) == count:
            break
    else:
        residency.counters.add("host_full")
    if evicted:
        residency.counters.add("host_evicted_blocks", evicted)
    return found


def reserve_disk(residency: Residency, slot_bytes: int) -> int | None:
    """A disk slot, evicting what may go. Locked.

    Evicts a little ahead: the tier writes down what it forgot before it writes over it, with the next group of blocks
    that becomes durable, and a write that comes before would have to wait.
    """
    if residency.disk is None:
        return None
    disk = residency.disk
    address = disk.reserve(slot_bytes)
    low = min(EVICT_AHEAD, disk.capacity // 16)
    if address is not None and disk.headroom(slot_bytes) >= low:
        return address
    numbers = range(len(residency.index.key))
    groups = victims(slot_bytes, disk, residency.disk_policy, partial(_disk_address, residency), numbers)
    while address is None or disk.headroom(slot_bytes) < low:
        group = next(groups, None)
        if group is None:
            break
        for number in group:
            residency.drop_disk(number)
        residency.counters.add("disk_evicted_blocks", len(group))
        address = disk.reserve(slot_bytes) if address is None else address
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
