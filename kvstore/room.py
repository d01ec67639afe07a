"""Room for a slot in a tier, made by evicting what may go. The store's lock guards every call."""

from __future__ import annotations

from collections.abc import Set
from functools import partial
from itertools import filterfalse, islice

from kvstore.eviction import victims
from kvstore.families import NONE
from kvstore.residency import Residency
from kvstore.tiers.base import Tier

EVICT_AHEAD = 512 << 20  # bytes that are kept free on disk at most, so that a write finds a slot that is ready
KEEP_FREE = 1 / 32  # of memory, after each save
FEW_MORE = 64  # blocks that are looked at besides, in vain


def tier_of(residency: Residency, number: int) -> str:
    """The fastest tier that has a stored block: "device", "host", "disk" or "remote". Locked."""
    if residency.hot is not None and number in residency.hot:
        return "device"
    if number in residency.residents:
        return "host"
    return "remote" if number in residency.index.remote else "disk"


def held_blocks(residency: Residency) -> Set[int]:
    """Blocks that leases or pins hold where they are in memory. Locked."""
    return residency.index.leases.keys() | residency.keeping.kept("host")


def held_bytes(residency: Residency) -> int:
    """Bytes of host slots that leases and pins hold now. Locked."""
    residents = (residency.residents.get(number) for number in held_blocks(residency))
    return sum(resident.layout.full_slot_bytes for resident in residents if resident is not None)


def reserve_host(residency: Residency, slot_bytes: int) -> int | None:
    """A host slot, evicting what may go; None when leases, pins and unwritten blocks hold the rest. Locked."""
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
        residency.uses.evicted("host", group)
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


def keep_free(residency: Residency, slot_bytes: int) -> None:
    """After a save: evicts from memory, a little at a time, until a share of it is free. Locked.

    What comes next finds room without waiting, and the policy chooses among all blocks, those that just came included.
    """
    host = residency.host
    wanted = (int(host.capacity * KEEP_FREE) - host.headroom(slot_bytes)) // slot_bytes
    if wanted <= 0:
        return
    going = least(residency, slot_bytes, wanted)
    residency.uses.evicted("host", going)
    for number in going:
        residency.drop_host(number)
    residency.counters.add("host_evicted_blocks", len(going))


def least(residency: Residency, slot_bytes: int, count: int) -> list[int]:
    """Up to ``count`` blocks that may go from memory, worth least first. Locked; the policy is left alone again."""
    found: list[int] = []
    candidates = filterfalse(partial(residency.keeping.stays, "host"), residency.host_policy.victims())
    for number in islice(candidates, count + FEW_MORE):
        address = _host_address(residency, number)
        if address != NONE and residency.host.same_class(address, slot_bytes):
            found.append(number)
            if len(found) == count:
                break
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
    low = _low(disk)
    if address is not None and disk.headroom(slot_bytes) >= low:
        return address
    numbers = range(len(residency.index.key))
    groups = victims(slot_bytes, disk, residency.disk_policy, partial(_disk_address, residency), numbers)
    while address is None or disk.headroom(slot_bytes) < low:
        group = next(groups, None)
        if group is None:
            break
        residency.uses.evicted("disk", group)
        for number in group:
            residency.drop_disk(number)
        residency.counters.add("disk_evicted_blocks", len(group))
        address = disk.reserve(slot_bytes) if address is None else address
    if address is None:
        residency.counters.add("disk_full")
    return address


def disk_room(residency: Residency, slot_bytes: int) -> int:
    """Bytes that can be written to disk in slots of this class before something goes for them. Locked."""
    disk = residency.disk
    return 0 if disk is None else max(disk.headroom(slot_bytes) - _low(disk), 0)


def _low(disk: Tier) -> int:
    return min(EVICT_AHEAD, disk.capacity // 16)


def step_down(residency: Residency, number: int) -> int:
    """A block that is on disk goes from memory, unless something holds it there; bytes that are free now. Locked."""
    resident = residency.residents.get(number)
    if resident is None or residency.index.disk[number] == NONE or _host_address(residency, number) == NONE:
        return 0
    residency.drop_host(number)
    return resident.layout.class_bytes(resident.stride)


def _host_address(residency: Residency, number: int) -> int:
    """Host slot of a block that may go from there, or NONE."""
    resident = residency.residents.get(number)
    if resident is None or number in residency.index.leases or residency.keeping.stays("host", number):
        return NONE
    if resident.clean or residency.disk is None or resident.failed:
        return resident.address
    size = resident.layout.full_slot_bytes
    if resident.unwanted and disk_room(residency, size) < size:
        return resident.address
    residency.write_soon(number)  # goes to disk first, and may go from here after that
    return NONE


def _disk_address(residency: Residency, number: int) -> int:
    """Disk slot of a block that may go from there, or NONE."""
    stays = number in residency.index.leases or residency.keeping.stays("disk", number)
    return NONE if stays else residency.index.disk[number]
