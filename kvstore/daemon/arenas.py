"""Memory that is shared by file descriptor: what the daemon writes and clients can only read, or what one client fills.

Nothing has a name in any filesystem, so nothing is left behind by whoever is killed: the last mapping takes the memory
with it. No arena can change its size, so no peer can make a reader of it fail.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass

log = logging.getLogger("kvstore")

F_ADD_SEALS, F_GET_SEALS = 1033, 1034
SEAL_SEAL, SEAL_SHRINK, SEAL_GROW, SEAL_FUTURE_WRITE = 1, 2, 4, 16
FIXED = SEAL_SEAL | SEAL_SHRINK | SEAL_GROW


@dataclass(frozen=True, slots=True)
class Arena:
    """One piece of shared memory. ``number``: the owner's, never used twice."""

    number: int
    bytes: int
    fd: int


class Allowance:
    """Bytes that several owners share. Any thread."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0  # used: guarded by _lock
        self._lock = threading.Lock()

    def take(self, size: int) -> bool:
        """Whether there is room; then it is taken."""
        with self._lock:
            fits = self.used + size <= self.limit
            self.used += size if fits else 0
        return fits

    def give(self, size: int) -> None:
        """Gives back what was taken."""
        with self._lock:
            self.used -= size
            assert self.used >= 0


class Arenas:
    """Maps the extents of a host tier (see ``tiers.host.Memory``), and keeps their descriptors for clients.

    ``writable``: clients may write, too. ``allowance``: what the bytes are taken from. ``retired`` is told of arenas
    that are no more. ``map`` and ``retire`` are called under the lock that guards the tier.
    """

    def __init__(
        self,
        name: str,
        writable: bool = False,
        allowance: Allowance | None = None,
        retired: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._name, self._writable, self._allowance, self.retired = name, writable, allowance, retired
        self._lock = threading.Lock()
        self._arenas: dict[int, Arena] = {}  # guarded by _lock

    def map(self, number: int, size: int) -> mmap.mmap | None:
        """A new arena, mapped; None when there is no memory, or no room in the allowance."""
        if self._allowance is not None and not self._allowance.take(size):
            return None
        try:
            fd, mapping = create(self._name, size, self._writable)
        except OSError as error:
            log.warning("no shared memory of %d bytes can be had: %s", size, error)
            if self._allowance is not None:
                self._allowance.give(size)
            return None
        with self._lock:
            self._arenas[number] = Arena(number, size, fd)
        return mapping

    def retire(self, number: int) -> None:
        """The tier has let go of an extent: clients that have it mapped keep its memory until they let go, too."""
        with self._lock:
            arena = self._arenas.pop(number, None)
        if arena is None:
            return
        os.close(arena.fd)
        if self._allowance is not None:
            self._allowance.give(arena.bytes)
        self.retired(number)

    def get(self, number: int) -> Arena | None:
        """The arena, if it is there still, with a descriptor of the caller's own, who closes it."""
        with self._lock:
            arena = self._arenas.get(number)
            return None if arena is None else Arena(arena.number, arena.bytes, os.dup(arena.fd))

    def close(self) -> None:
        """Lets go of all descriptors."""
        with self._lock:
            numbers = list(self._arenas)
        for number in numbers:
            self.retire(number)


def create(name: str, size: int, writable: bool) -> tuple[int, mmap.mmap]:
    """Shared memory of a fixed size, and this process's writable mapping of it. Others can write if ``writable``.

    Raises ``OSError``."""
    fd = os.memfd_create(f"kvstore-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        mapping = mmap.mmap(fd, size)
        fcntl.fcntl(fd, F_ADD_SEALS, FIXED | (0 if writable else SEAL_FUTURE_WRITE))
    except BaseException:
        os.close(fd)
        raise
    return fd, mapping


def sealed(fd: int, writable: bool) -> bool:
    """Whether a descriptor that came from elsewhere is of shared memory whose size can never change, and, if not
    ``writable``, that nobody can map for writing any more."""
    wanted = SEAL_SHRINK | SEAL_GROW | (0 if writable else SEAL_FUTURE_WRITE)
    try:
        return fcntl.fcntl(fd, F_GET_SEALS) & wanted == wanted
    except OSError:
        return False
