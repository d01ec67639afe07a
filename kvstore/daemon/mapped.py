"""The daemon's arenas as a client has them: mapped once, looked into for as long as anything refers to them."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from kvstore.daemon.arenas import sealed
from kvstore.daemon.channel import close_all
from kvstore.errors import TierError

log = logging.getLogger("kvstore")


class _Buffer(ctypes.Structure):
    """Python's ``Py_buffer``: the one way to learn where read-only memory is."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_void_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


_get, _release = ctypes.pythonapi.PyObject_GetBuffer, ctypes.pythonapi.PyBuffer_Release
_get.argtypes = (ctypes.py_object, ctypes.POINTER(_Buffer), ctypes.c_int)
_release.argtypes = (ctypes.POINTER(_Buffer),)


def base_of(buffer: object) -> int:
    """Memory address of the first byte of any contiguous buffer."""
    held = _Buffer()
    _get(buffer, ctypes.byref(held), 0)
    address: int = held.buf
    _release(ctypes.byref(held))
    return address


class Shared(mmap.mmap):
    """An arena's memory. ``base``: where it begins; ``writable``: here, as the client's own staging area is."""

    base = 0
    writable = False
    leaving: Callable[[Shared], None] | None = None  # told once nothing refers to it any more, and may keep it

    def __del__(self) -> None:
        if self.leaving is not None:
            self.leaving(self)


class Mapped(NamedTuple):
    """One arena: its bytes, and where they begin."""

    view: memoryview
    base: int


def mapped(fd: int, size: int, writable: bool, came: Callable[[Shared], None] = lambda _: None) -> Mapped:
    """Maps an arena; closes the descriptor. ``came`` is told of it. Raises ``TierError`` when it is not of a fixed
    size: who could shrink it could have this process killed."""
    try:
        if not sealed(fd, writable) or os.fstat(fd).st_size < size:
            raise TierError("the daemon sent memory that is not sealed")
        prot = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        memory = Shared(fd, size, prot=prot)
    except (OSError, ValueError) as error:
        raise TierError(f"an arena of {size} bytes cannot be mapped: {error}") from error
    finally:
        os.close(fd)
    memory.base, memory.writable = base_of(memory), writable
    came(memory)
    return Mapped(memoryview(memory), memory.base)


class Mappings:
    """The arenas of one session. ``staging``: they are the client's own. Any thread."""

    def __init__(self, came: Callable[[Shared], None]) -> None:
        """``came`` is told of each."""
        self._came = came
        self._lock = threading.Lock()
        self._arenas: dict[tuple[bool, int], Mapped] = {}  # guarded by _lock

    def get(self, staging: bool, number: int) -> Mapped:
        """An arena that came with some answer. Raises ``TierError``."""
        with self._lock:
            found = self._arenas.get((staging, number))
        if found is None:
            raise TierError(f"arena {number} is not here any more")
        return found

    def arrived(self, arenas: Sequence[Sequence[Any]], fds: list[int]) -> None:
        """Maps what came with an answer: of each arena whether it is for staging, its number and bytes."""
        for (staging, number, size), fd in zip(arenas, fds, strict=False):
            try:
                arena = mapped(fd, size, staging, self._came)
            except TierError as error:
                log.warning("%s", str(error))
                continue
            with self._lock:
                self._arenas[staging, number] = arena
        close_all(fds[len(arenas) :])

    def retire(self, staging: bool, number: int) -> None:
        """The daemon has no more use for it."""
        with self._lock:
            self._arenas.pop((staging, number), None)

    def close(self) -> None:
        """The session is over: what loads look into they hold themselves; drafts do not."""
        with self._lock:
            self._arenas = {known: arena for known, arena in self._arenas.items() if known[0]}
