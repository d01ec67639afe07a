"""Deletion that erases: blocks become invisible at once, and their bytes are destroyed, not just given back."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass

from kvstore.errors import BadInput, TierError
from kvstore.match import Match
from kvstore.mover import Mover, Priority
from kvstore.remote.tier import RemoteTier
from kvstore.remote.withdrawal import Wish
from kvstore.residency import Residency
from kvstore.tiers.base import Tier

log = logging.getLogger("kvstore")


@dataclass(frozen=True, slots=True)
class Receipt:
    """What ``forget`` erased. ``deferred`` blocks are invisible already; their bytes go when their last lease ends, or,
    where the disk could not be written, with the next ``forget`` or ``close``. ``remote_blocks``: copies that hosts
    share and that are gone, too; where that could not be done, ``deferred`` is at least 1, and it is tried again when
    the remote tier answers."""

    blocks: int
    bytes: int
    deferred: int
    remote_blocks: int = 0


class Eraser:
    """One per store."""

    def __init__(self, residency: Residency, mover: Mover, remote: RemoteTier | None = None) -> None:
        self._residency, self._mover, self._remote = residency, mover, remote
        self._erasing = threading.Lock()  # one at a time: who comes back may say that all is gone
        residency.erase_soon = self._erase_soon

    def forget(
        self, tenant: str | None, owner: str | None, older_than: float | None, match: Match | None = None
    ) -> Receipt:
        """See ``Store.forget``."""
        residency = self._residency
        if tenant is None and owner is None and older_than is None and match is None:
            raise BadInput("forget needs a tenant, an owner, an age or a match: an empty call would erase everything")
        blocks = size = deferred = 0
        with residency.lock:
            residency.check_open()
            residency.settle()
            index = residency.index
            now = residency.wall()
            before = now - older_than if older_than is not None else float("inf")
            wanted = {
                i
                for i, kind in enumerate(index.kinds)
                if (tenant is None or kind.tenant == tenant) and (owner is None or kind.owner == owner)
            }
            numbers = list(index.number.values()) if match is None else self._of(match)
            if match is not None:
                wanted &= {index.kind[number] for number in numbers}
            deferred += residency.erase_doomed(wanted)  # superseded or expired, and held or being written
            keys = None if match is None else frozenset(index.key[number] for number in numbers)
            numbers = [n for n in numbers if index.kind[n] in wanted and index.created[n] <= before]
            if self._remote is not None:
                self._remote.let_go(set(numbers))
            for number in sorted(numbers, key=index.sequence.__getitem__, reverse=True):
                if index.present(number):
                    blocks += 1
                    size += residency.payload(number)
                    deferred += residency.doom(number, erase=True)
        residency.counters.add("forgotten_blocks", blocks)
        deferred += self.erase(always=True)  # slots of blocks that were evicted may hold such bytes, too
        if self._remote is None:
            return Receipt(blocks, size, deferred)
        gone, left = self._remote.withdraw(Wish(tenant, owner, min(before, now), keys))
        return Receipt(blocks, size, deferred + left, gone)

    def _of(self, match: Match) -> list[int]:
        """The blocks of a match, whose lease ends, and all that stand behind them. Locked."""
        parent = self._residency.index.parent
        found, others = {number for number, _ in match.held()}, set[int]()
        match.release()
        self._residency.settle()
        numbers = list(self._residency.index.number.values())
        for number in numbers:
            path = []
            while number >= 0 and number not in found and number not in others:
                path.append(number)
                number = parent[number]
            (found if number in found else others).update(path)
        return [number for number in numbers if number in found]

    def _erase_soon(self) -> None:
        self._mover.submit(Priority.SAVE, (0,), self._job)

    def _job(self) -> None:
        self.erase()

    def erase(self, always: bool = False) -> int:
        """Destroys what is to be destroyed on the device and on disk; returns how many blocks it could not (at least
        one, if any)."""
        with self._erasing:
            return self._erase_device() + self._erase_disk(always)

    def _erase_device(self) -> int:
        residency, hot = self._residency, self._residency.hot
        if hot is None:
            return 0
        with residency.lock:
            slots = hot.take_erasable()
        if not slots:
            return 0
        try:
            hot.tier.erase([slot.address for slot in slots]).wait()
        except (TierError, RuntimeError) as error:  # the latter is how torch says that the device has failed
            log.warning("forgotten blocks are not yet erased from the device: %s", error)
            residency.counters.add("failed_erases")
            with residency.lock:
                hot.not_erased(slots)
            return len(slots)
        with residency.lock:
            for slot in slots:
                hot.tier.free(slot.address)
        residency.counters.add("device_erased_blocks", len(slots))
        return 0

    def _erase_disk(self, always: bool) -> int:
        residency = self._residency
        with residency.lock:
            doomed = residency.doomed.take_erasable()
        if residency.disk is None or not (doomed or always):
            return 0
        try:
            residency.disk.erase([d.disk for d in doomed])
        except TierError as error:
            log.warning("forgotten blocks are not yet erased from disk: %s", error)
            residency.counters.add("failed_erases")
            with residency.lock:
                residency.doomed.not_erased(doomed)
            return max(len(doomed), 1)
        with residency.lock:
            for d in doomed:
                residency.disk.free(d.disk)
        return self._retire_keys(residency.disk)

    def _retire_keys(self, disk: Tier) -> int:
        """Destroys keys with which nothing was sealed that is left; returns 1 if that failed."""
        if disk.vault is None:
            return 0
        try:
            disk.vault.retire(self._namespaces)
        except TierError as error:
            log.warning("keys of what was forgotten are not yet destroyed: %s", error)
            self._residency.counters.add("failed_erases")
            return 1
        return 0

    def _namespaces(self) -> set[bytes]:
        """Those of all blocks that are anywhere, or that somebody still reads or writes."""
        with self._residency.lock:
            index = self._residency.index
            kinds = set(map(index.kind.__getitem__, index.number.values()))
            return {index.kinds[kind].namespace for kind in kinds}
