"""What will not come back is not written to disk: flash wears out, and writes take from reads. The store's lock guards
every call."""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.residency import Residency
from kvstore.room import disk_room
from kvstore.writer import Writer


class Admission:
    """Decides which blocks go to disk of themselves. One per store."""

    def __init__(self, residency: Residency, writer: Writer) -> None:
        self._residency, self._writer = residency, writer
        residency.admit = self.admit

    def admit(self, chain: Sequence[int]) -> None:
        """A chain, root first, was saved or used. Of its unwritten blocks all are wanted while the disk has room, then
        those that the policy admits, and what stands before them. Full ones are queued; partial ones wait until they
        are evicted or asked for. What is not wanted is evicted unwritten while the disk is full."""
        residency, writer = self._residency, self._writer
        unwritten = [number for number in chain if writer.writable(number)]
        if not unwritten:
            return
        layout = residency.residents[unwritten[0]].layout
        room = disk_room(residency, layout.full_slot_bytes) // layout.full_slot_bytes - writer.queued
        wanted = len(unwritten)
        while wanted > max(room, 0) and not self._admits(unwritten[wanted - 1]):
            wanted -= 1
        refused = 0
        for at, number in enumerate(unwritten):
            resident, before = residency.residents[number], residency.residents[number].unwanted
            resident.unwanted = at >= wanted
            refused += resident.unwanted and not before
            if not resident.unwanted and residency.index.count[number] == layout.block_tokens:
                writer.enqueue(number)
        if refused:
            residency.counters.add("not_admitted_blocks", refused)

    def _admits(self, number: int) -> bool:
        return self._residency.keeping.stays("disk", number) or self._residency.host_policy.admits(number)
