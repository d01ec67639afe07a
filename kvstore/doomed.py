"""Bytes that lost their place in the index: given back when the last lease on their block ends, or destroyed then. The
store's lock guards every call."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass

from kvstore.families import NONE
from kvstore.tiers.base import Tier
from kvstore.tiers.host import HostTier


@dataclass(slots=True)
class Doomed:
    """A host slot and a disk slot (NONE: none) that no block has any more; ``kind`` is that of the block that had."""

    host: int
    disk: int
    erase: bool
    kind: int = NONE


class DoomedSlots:
    """One per store. ``len``: blocks whose leases keep such slots."""

    def __init__(self, host: HostTier, disk: Tier | None, erase_soon: Callable[[], None]) -> None:
        """``erase_soon`` is called when ``take_erasable`` has something."""
        self._host, self._disk, self._erase_soon = host, disk, erase_soon
        self._held: dict[int, list[Doomed]] = {}  # by block
        self._erasable: list[Doomed] = []

    def __len__(self) -> int:
        return len(self._held)

    def hold(self, number: int, doomed: Doomed) -> None:
        """Keeps slots until the last lease on a block ends."""
        self._held.setdefault(number, []).append(doomed)

    def unleased(self, number: int) -> None:
        """The last lease on a block has ended."""
        for doomed in self._held.pop(number, ()):
            self.give_back(doomed)

    def give_back(self, doomed: Doomed) -> None:
        """Nobody needs these slots."""
        if doomed.host != NONE:
            if doomed.erase:
                self._host.erase(doomed.host)
            self._host.free(doomed.host)
        if doomed.disk != NONE and self._disk is not None:
            if doomed.erase:
                self._erasable.append(doomed)
                self._erase_soon()
            else:
                self._disk.free(doomed.disk)

    def erase(self, kinds: Set[int]) -> int:
        """Has all that only leases keep erased when it goes; returns how much of it is of these kinds."""
        waiting = [doomed for several in self._held.values() for doomed in several if not doomed.erase]
        for doomed in waiting:
            doomed.erase = True
        return sum(doomed.kind in kinds for doomed in waiting)

    def take_erasable(self) -> list[Doomed]:
        """Disk slots whose bytes are to be destroyed; the caller frees them afterwards."""
        taken, self._erasable = self._erasable, []
        return taken

    def not_erased(self, doomed: Sequence[Doomed]) -> None:
        """The disk would not destroy what ``take_erasable`` gave; the next try takes it again."""
        self._erasable += doomed
