"""One block on its way from disk, or from the remote tier, to a host slot, and those who wait for its layers.

Its parts are jobs of the mover. A part may be asked for twice, the second time in more of a hurry; who comes first
begins it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from kvstore.block import Header
from kvstore.index import Index
from kvstore.mover import Priority
from kvstore.rates import PART_BYTES
from kvstore.remote.block import RemoteBlock
from kvstore.residency import Resident

if TYPE_CHECKING:
    from kvstore.cipher import Opened


class Fetch:
    """One block on its way to a host slot; one fetch serves all who wait for the block."""

    def __init__(
        self,
        number: int,
        resident: Resident,
        view: memoryview,
        address: int,
        header_bytes: int,
        priority: Priority = Priority.DEMAND,
        turn: tuple[int, int] = (0, 0),
        part_bytes: int = PART_BYTES,
        block: RemoteBlock | None = None,
    ) -> None:
        """``turn``: its place among fetches of this priority, before and behind the number of the part. ``part_bytes``:
        of one part, about. ``block``: it comes from the remote tier, cut as it was there."""
        self.number = number
        self.resident = resident
        self.view = view
        self.address = address
        self.layout = resident.layout
        self.offsets = self.layout.layer_offsets(resident.stride)
        self.header_bytes = header_bytes
        self.block = block
        groups = () if block is None else block.groups
        self.parts = [(group.first, group.last) for group in groups] or parts_of(self.offsets, part_bytes)
        # Guarded by the store's lock: the header once it is there, and the tokens that loads expect the block to start
        # with.
        self.header: Header | None = None if block is None else block.header
        self.promised: list[bytes] = []
        self.opened: Opened | None = None  # of a sealed block, set before any part but the first is asked for
        self.progress = threading.Condition()  # guards the fields below
        self.ready = 0  # layers that are in memory and verified, as bits
        self.failed = False
        self.cancelled = False  # failed, but nothing is wrong with the block
        self.times: dict[int, tuple[float, float]] = {}  # part -> when it was read and checked (time.perf_counter)
        self.prefetched = priority != Priority.DEMAND  # it was begun before anybody asked; never changes
        self.priority, self._turn = priority, turn
        self._left = len(self.parts)  # parts that are not over
        self._begun = 0  # parts that somebody has begun, as bits
        self._spread = False  # the parts behind the first were asked for
        self._watchers: list[Callable[[], None]] = []

    @property
    def tier(self) -> str:
        """Where it comes from: "disk" or "remote"."""
        return "disk" if self.block is None else "remote"

    def there(self, index: Index) -> bool:
        """Whether the block still is what it was when the fetch began, and where. Under the store's lock."""
        if self.block is None:
            return index.disk[self.number] == self.address
        return index.remote.get(self.number) is self.block

    def turn(self, part: int) -> tuple[Priority, tuple[int, int, int]]:
        """When a part's turn is, for ``Mover.submit``."""
        with self.progress:
            first, last = self._turn
            return self.priority, (first, part, last)

    def begin(self, part: int) -> bool:
        """Whether the caller is the first who begins this part."""
        with self.progress:
            fresh = not self._begun >> part & 1
            self._begun |= 1 << part
        return fresh

    def spread(self) -> Sequence[int]:
        """The first part is over: those that are to be asked for now."""
        with self.progress:
            self._spread = True
        return range(1, len(self.parts))

    def hasten(self, place: int) -> list[int]:
        """Somebody waits for it from now on, at this place of a load. Returns the parts to ask for once more."""
        with self.progress:
            if self.priority == Priority.DEMAND and not self._turn[0]:
                return []
            self.priority, self._turn = Priority.DEMAND, (0, place)
            asked = range(1, len(self.parts)) if self._spread else range(1)
            return [part for part in asked if not self._begun >> part & 1]

    def take_back(self) -> bool:
        """True: nobody waits for it, no part has begun, and none will."""
        with self.progress:
            idle = self.priority != Priority.DEMAND and not self._begun
            if idle:
                self._begun = (1 << len(self.parts)) - 1
                self.failed = self.cancelled = True
        return idle

    def wait(self, layer: int, deadline: float) -> bool:
        """Until the layer is there (True), the fetch has failed, or the deadline (monotonic) has passed (False)."""
        bit = 1 << layer
        with self.progress:
            while not self.ready & bit and not self.failed:
                if not self.progress.wait(max(deadline - time.monotonic(), 0)):
                    return bool(self.ready & bit)
            return bool(self.ready & bit)

    def wait_all(self, deadline: float) -> bool:
        """``wait`` for every layer."""
        return all(self.wait(first, deadline) for first, _ in self.parts)

    @property
    def complete(self) -> bool:
        """Whether all layers are there."""
        with self.progress:
            return self.ready == (1 << len(self.offsets) - 1) - 1

    @property
    def left(self) -> int:
        """Bytes that have yet to be read."""
        with self.progress:
            return self._bytes(part for part, (first, _) in enumerate(self.parts) if not self.ready >> first & 1)

    @property
    def ahead(self) -> int:
        """Bytes of these that go before what anybody asks for now: the rest of a prefetch makes way."""
        if self.priority == Priority.DEMAND:
            return self.left
        with self.progress:
            under_way = (part for part in range(len(self.parts)) if self._begun >> part & 1)
            return self._bytes(part for part in under_way if not self.ready >> self.parts[part][0] & 1)

    def _bytes(self, parts: Iterable[int]) -> int:
        return sum(self.offsets[self.parts[part][1]] - self.offsets[self.parts[part][0]] for part in parts)

    def catch_up(self, ready: int) -> None:
        """These layers (bits) are there: another process, whose fetch it is, says so."""
        with self.progress:
            self.ready |= ready
            self._tell()

    def watch(self, told: Callable[[], None]) -> None:
        """Has ``told`` called now, and each time when layers arrive or it fails, by the thread that notices."""
        with self.progress:
            self._watchers.append(told)
        told()

    def _tell(self) -> None:
        """Locked by ``progress``."""
        self.progress.notify_all()
        for told in self._watchers:
            told()

    def arrive(self, first: int, last: int) -> None:
        """Layers ``first`` to ``last - 1`` are in memory and verified."""
        with self.progress:
            self.ready |= (1 << last) - (1 << first)
            self._tell()

    def took(self, part: int, begin: float, end: float) -> None:
        """Notes when a part was read and checked."""
        with self.progress:
            self.times[part] = (begin, end)

    def time_of(self, layer: int) -> tuple[float, float] | None:
        """When the part with this layer was read and checked; None when it was not."""
        part = next(number for number, (first, last) in enumerate(self.parts) if first <= layer < last)
        with self.progress:
            return self.times.get(part)

    def fail(self) -> bool:
        """The rest will not come; True the first time."""
        with self.progress:
            first, self.failed = not self.failed, True
            self._tell()
        return first

    def cancel(self) -> None:
        """``fail``, for no fault of the block's."""
        with self.progress:
            self.cancelled = self.cancelled or not self.failed
            self.failed = True
            self._tell()

    def part_over(self) -> bool:
        """One part is done with, well or not; True for the last."""
        with self.progress:
            self._left -= 1
            return self._left == 0


def parts_of(offsets: Sequence[int], part_bytes: int) -> list[tuple[int, int]]:
    """Runs of layers (first, last + 1) of about ``part_bytes``.

    Where there are several, the first is layer 0 alone: an engine can begin when it has come.
    """
    if offsets[-1] <= part_bytes:
        return [(0, len(offsets) - 1)]
    bounds, first = [(0, 1)], 1
    for layer in range(2, len(offsets)):
        if offsets[layer] - offsets[first] >= part_bytes or layer == len(offsets) - 1:
            bounds.append((first, layer))
            first = layer
    return bounds
