"""What an opened store takes in from its disk tier, before any other thread knows of it."""

from __future__ import annotations

import gc
from itertools import count

from kvstore.residency import Residency
from kvstore.tiers.base import Tier


def restore(residency: Residency, disk: Tier) -> None:
    """Fills the index and the disk policy with the blocks that ``disk`` holds; what nothing could reach goes."""
    index = residency.index
    collecting = gc.isenabled()
    gc.disable()  # millions of objects come in and none of them is garbage: the collector would only look for it
    try:
        order, lost = index.restore(disk.load())
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
    for entry in lost:
        disk.forget([entry.sequence])
        disk.free(entry.address)
    if lost:
        residency.counters.add("unreachable_blocks", len(lost))
    last = max(max(index.sequence, default=0), max((entry.sequence for entry in lost), default=0))
    residency.sequences = count(last + 1)
