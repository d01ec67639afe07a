"""A client's staging area: memory that it fills, block by block, and that the daemon copies from."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial

from kvstore.daemon.arenas import Allowance, Arenas
from kvstore.errors import BadInput
from kvstore.layout import Layout
from kvstore.save import Draft
from kvstore.tiers.host import HostTier

LEAST = 1 << 20  # bytes of an area, however little is allowed


class Area:
    """Drafts of one client, by number. Any thread."""

    def __init__(self, name: str, allowance: Allowance, retired: Callable[[int], None]) -> None:
        """``retired``: see ``Arenas``; it is called under this area's lock."""
        self.arenas = Arenas(name, writable=True, allowance=allowance, retired=retired)
        self._lock = threading.Lock()  # guards the fields below
        self._tier = HostTier(max(allowance.limit, LEAST), memory=self.arenas)
        self._drafts: dict[int, tuple[int, Layout]] = {}  # by number: slot, layout
        self._copies: dict[int, Future[Draft | None]] = {}  # of drafts that were filled in one go
        self._next, self._closed = 1, False

    def reserve(self, layout: Layout, count: int) -> list[tuple[int, int]]:
        """Up to ``count`` drafts that the client may fill: number and slot of each.

        What clients say of drafts comes over two sockets, in no order; so a number, unlike a slot, is never used
        again, and what comes late means nothing."""
        found: list[tuple[int, int]] = []
        with self._lock:
            while len(found) < count and (address := self._tier.reserve(layout.full_slot_bytes)) is not None:
                number, self._next = self._next, self._next + 1
                self._drafts[number] = address, layout
                found.append((number, address))
        return found

    def draft(self, number: int) -> tuple[Layout, memoryview]:
        """A draft that the client has filled. Raises ``BadInput``."""
        with self._lock:
            address, layout = self._drafts.get(number, (0, None))
            if layout is None:
                raise BadInput("a draft was given away before; ask store.draft for a new one")
            return layout, self._tier.view(address)

    def offset(self, address: int) -> int:
        """Where a slot begins in its arena."""
        return self._tier.offset(address)

    def copy_of(self, number: int) -> Future[Draft | None] | None:
        """The copy that ``copying`` has begun."""
        with self._lock:
            return self._copies.get(number)

    def copying(self, number: int, copy: Callable[[], Future[Draft | None]]) -> None:
        """The client has filled a draft in one go: ``copy`` begins to copy it in, if the draft is there still."""
        with self._lock:
            if number in self._drafts and number not in self._copies:
                self._copies[number] = copy()

    def discard(self, numbers: Sequence[int]) -> None:
        """The client needs these drafts no more.

        A copy under way keeps the slot until it is over: what it copies is let go, but nobody else may fill it."""
        with self._lock:
            for number in numbers:
                copy = self._copies.pop(number, None)
                if copy is None or copy.cancel() or copy.done():
                    self._free(number)
                else:
                    copy.add_done_callback(partial(self._copied, number))

    def _copied(self, number: int, _: object) -> None:
        with self._lock:
            self._free(number)

    def _free(self, number: int) -> None:
        address, layout = self._drafts.pop(number, (0, None))
        if layout is not None and not self._closed:
            self._tier.free(address)

    def trim(self) -> None:
        """Gives back staging memory that nothing is in; others may need it."""
        with self._lock:
            self._tier.trim()

    @property
    def count(self) -> int:
        """How many drafts there are."""
        return len(self._drafts)

    @property
    def bytes(self) -> int:
        """What the area takes, filled or not."""
        return self._tier.used

    def close(self) -> None:
        """Lets go of all; copies under way finish on memory of their own."""
        with self._lock:
            self._closed = True
            self._drafts.clear()
            self._copies.clear()
            self._tier.close()
            self.arenas.close()
