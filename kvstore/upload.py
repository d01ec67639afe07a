"""Blocks that waiting jobs will read, on their way from host memory to the device ahead of any load."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from kvstore.errors import TierError
from kvstore.hot import Hold, Hot, Slot
from kvstore.lease import Lease
from kvstore.loader import LEASE_SHARE
from kvstore.mover import Mover, Priority
from kvstore.residency import Residency
from kvstore.waiting import Waiting

log = logging.getLogger("kvstore")

LAST = 1 << 62  # a turn behind those of all reads


@dataclass(slots=True)
class Upload:
    """One job's blocks: ``hold`` keeps them in memory and has their slots on the device; ``sources`` are payloads."""

    hold: Hold
    sources: list[memoryview]


class Uploader:
    """Starts uploads. One per store with a device tier."""

    def __init__(self, residency: Residency, hot: Hot, mover: Mover) -> None:
        self._residency, self._hot, self._mover = residency, hot, mover

    def begin(self, chains: Sequence[Sequence[int]], jobs: Sequence[Waiting]) -> list[Upload]:
        """Slots for what ``jobs``, the first of those whose ``chains`` are given, have in memory only. A share of the
        device is for them, the nearest first, and none of them makes room for another. The caller submits it. Locked.
        """
        hot = self._hot
        hot.schedule(chains)
        room, fit, seen = int(hot.tier.capacity * LEASE_SHARE), 0, set[int]()
        for job in jobs:
            seen.update(number for number, _ in job.blocks)
            if len(seen) * (job.layout.full_slot_bytes - job.layout.header_bytes) > room:
                break
            fit += 1
        hot.protect(fit)
        uploads = [self.of([number for number, _ in job.blocks], job.chain) for job in jobs[:fit]]
        hot.protect(0)
        return [upload for upload in uploads if upload is not None]

    def of(self, numbers: Sequence[int], chain: Sequence[int]) -> Upload | None:
        """What of these blocks is in memory only, as far as there is room for it; None: nothing. Locked.

        ``chain``: the same, and what stands before them, root first."""
        residency, hot = self._residency, self._hot
        slots, sources = list[Slot](), list[memoryview]()
        for number in numbers:
            resident = residency.residents.get(number)
            if resident is None or hot.placed(number):
                continue
            slot = hot.place(number, resident.layout, resident.stride)
            if slot is None:
                break
            header, size = resident.layout.header_bytes, resident.layout.payload_bytes(resident.stride)
            slots.append(slot)
            sources.append(residency.host.view(resident.address)[header : header + size])
        if not slots:
            return None
        hot.arrange(chain)
        numbers = [slot.number for slot in slots]
        residency.hold(numbers)
        return Upload(Hold(Lease(numbers, residency.lease_ended), slots), sources)

    def submit(self, uploads: Sequence[Upload]) -> None:
        """Has them done by the mover, behind the reads of waiting jobs. Not locked."""
        for upload in uploads:
            self._mover.submit(Priority.PREFETCH, (LAST,), partial(self._run, upload))

    def _run(self, upload: Upload) -> None:
        residency, hold, hot = self._residency, upload.hold, self._hot
        try:
            for slot, source in zip(hold.slots, upload.sources, strict=True):
                hold.events.append(hot.tier.upload(slot.address, source))
        except TierError as error:
            log.warning("a block is not copied to the device ahead: %s", error)
            residency.counters.add("failed_uploads")
        finally:
            with residency.lock:
                residency.counters.add("uploaded_blocks", len(hold.events))
                hot.filled(hold.slots[: len(hold.events)])
                residency.load_ended(hold)
                residency.settle()
                residency.changed.notify_all()
