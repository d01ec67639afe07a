"""What an opened disk tier does with what it finds: which slots are in use, and what goes when the budget shrank."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import islice

from kvstore.keys import KEY_BYTES
from kvstore.tiers.base import Entry
from kvstore.tiers.catalog import Snapshot
from kvstore.tiers.slab import SLOT_BITS, SLOT_MASK, Extent, Slab
from kvstore.vault import Vault

_BATCH = 4096


def beyond(slab: Slab, snapshot: Snapshot, index_bytes: int, index_limit: int) -> list[Extent]:
    """Extents to give back so that slots and index fit their budgets: those whose blocks were used longest ago."""
    if slab.used <= slab.capacity and index_bytes <= index_limit:
        return []
    used: dict[int, float] = defaultdict(float)
    count: dict[int, int] = defaultdict(int)
    for entry in snapshot.entries():
        number = entry.address >> SLOT_BITS
        used[number] = max(used[number], entry.used)
        count[number] += 1
    each = index_bytes / max(1, sum(count.values()))
    total, index, gone = slab.used, sum(count.values()) * each, []
    for extent in sorted(slab.extents.values(), key=lambda extent: used[extent.number]):
        if total <= slab.capacity and (index_bytes <= index_limit or index <= 0.8 * index_limit):
            break
        gone.append(extent)
        total -= slab.cost(extent)
        index -= count[extent.number] * each
    return gone


def claim(slab: Slab, snapshot: Snapshot) -> set[int]:
    """Marks the slots of all entries as used. Returns the sequences that have none: their extent is not there, or a
    younger block has the slot."""
    addresses = snapshot.addresses()
    taken: dict[int, set[int]] = defaultdict(set)
    for address in addresses:
        taken[address >> SLOT_BITS].add(address & SLOT_MASK)
    extents, lost = slab.extents, set[int]()
    if sum(map(len, taken.values())) == len(addresses) and all(
        number in extents and max(slots) < extents[number].slots for number, slots in taken.items()
    ):
        for number, slots in taken.items():
            slab.occupy(number, slots)
    else:
        for entry in sorted(snapshot.entries(), key=lambda entry: -entry.sequence):
            if not slab.claim(entry.address):
                lost.add(entry.sequence)
    slab.settle()
    return lost


def without(snapshot: Snapshot, lost: set[int]) -> Iterator[Entry]:
    """All entries but the lost ones."""
    if not lost:
        return snapshot.entries()
    return (entry for entry in snapshot.entries() if entry.sequence not in lost)


def revealed(entries: Iterable[Entry], vault: Vault) -> Iterator[Entry]:
    """The entries, in their order, with the keys that sealed ones had before; those without a key are left as they
    are."""
    entries, new = iter(entries), tuple.__new__
    while batch := list(islice(entries, _BATCH)):
        sealed: dict[bytes, list[int]] = defaultdict(list)
        for place, entry in enumerate(batch):
            if entry.seal:
                sealed[entry.namespace].append(place)
        for namespace, places in sealed.items():
            key = vault.known(namespace)
            places = [place for place in places if key is not None and key.mark == batch[place].seal]
            if key is None or not places:
                continue
            plain = key.unmask(b"".join([batch[place].key + batch[place].parent for place in places]))
            for start, place in zip(range(0, len(plain), 2 * KEY_BYTES), places, strict=True):
                middle, end = start + KEY_BYTES, start + 2 * KEY_BYTES
                sequence, address, _, _, *rest, _ = batch[place]
                batch[place] = new(Entry, (sequence, address, plain[start:middle], plain[middle:end], *rest, 0))
        yield from batch
