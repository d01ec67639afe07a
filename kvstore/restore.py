"""What an opened store takes in from its disk tier, before any other thread knows of it."""

from __future__ import annotations

import gc
import logging
from array import array
from collections.abc import Iterable, Iterator
from itertools import count

from kvstore.errors import BadInput
from kvstore.residency import Residency
from kvstore.tiers.base import Entry, Tier

log = logging.getLogger("kvstore")


def restore(residency: Residency, disk: Tier) -> None:
    """Fills the index and the disk policy with the blocks that ``disk`` holds; what nothing could reach goes."""
    index = residency.index
    collecting = gc.isenabled()
    gc.disable()  # millions of objects come in and none of them is garbage: the collector would only look for it
    try:
        used = array("d")
        sealed: list[Entry] = []
        order, lost = index.restore(_readable(disk.load(), sealed), used)
        residency.uses.restore(used)
        insert, arrival = residency.disk_policy.insert, residency.arrival
        for number in order:
            arrived = arrival(number)
            residency.disk_payload += arrived.size
            insert(number, arrived)
    finally:
        if collecting:
            gc.enable()
    for number, when in enumerate(index.expires):
        if when:
            residency.expire_at(number, when)
    if sealed and disk.vault is None:
        raise BadInput(
            f"the cache holds {len(sealed)} encrypted blocks; give encryption=, the folder of their keys, or an empty "
            "one, which lets go of them"
        )
    if lost:
        residency.counters.add("unreachable_blocks", len(lost))
    if sealed:
        residency.counters.add("sealed_blocks", len(sealed))
        log.warning("%d blocks on disk are dropped: the keys that they were sealed with are not there", len(sealed))
        lost += sealed
    for entry in lost:
        disk.forget([entry.sequence])
        disk.free(entry.address)
    last = max(max(index.sequence, default=0), max((entry.sequence for entry in lost), default=0))
    residency.sequences = count(last + 1)


def _readable(entries: Iterable[Entry], sealed: list[Entry]) -> Iterator[Entry]:
    """The entries without those that are sealed and have no key, which go to ``sealed``."""
    for entry in entries:
        if entry.seal:
            sealed.append(entry)
        else:
            yield entry
