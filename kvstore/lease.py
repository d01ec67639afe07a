"""A lease: the right to read blocks, which stay where they are as long as it lasts."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence


class Lease:
    """Holds block numbers until ``release``, or until nobody refers to it any more.

    The collector may run the end of a lease at any moment, in any thread, with the store's lock held. So an ended
    lease only hands its numbers to ``ended`` (which must not take a lock); the store takes them in with its next call.
    """

    __slots__ = ("__weakref__", "_finalizer")

    def __init__(self, numbers: Sequence[int], ended: Callable[[Sequence[int]], None]) -> None:
        self._finalizer = weakref.finalize(self, ended, numbers)
        self._finalizer.atexit = False

    @property
    def active(self) -> bool:
        """Whether the blocks are still held."""
        return self._finalizer.alive

    def shorten(self, count: int) -> None:
        """Holds only the first ``count`` blocks from now on."""
        held = self._finalizer.detach()
        if held is not None:
            _, ended, (numbers,), _ = held
            self._finalizer = weakref.finalize(self, ended, numbers[:count])
            self._finalizer.atexit = False
            ended(numbers[count:])

    def release(self) -> None:
        """Ends the lease; again is no error."""
        self._finalizer()
