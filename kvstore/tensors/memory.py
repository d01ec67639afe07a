"""Recycled memory for large tensors on the CPU.

The first touch of a fresh page costs many times what writing to it costs, and torch gives large blocks back to the
system at once, so that every large tensor starts with fresh pages. Tensors from here hand their memory on instead.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import threading
import weakref
from bisect import bisect_left, insort
from collections import deque

import torch

LARGE = 1 << 20  # bytes from which it pays
STEP = 16  # sizes are rounded up to a sixteenth of their power of two, so that a longer prompt finds a buffer too
MAX_IDLE = 1 << 30  # bytes that are kept for the next tensors


class Recycler:
    """Hands out tensors over memory that earlier tensors have left. Any thread."""

    def __init__(self, max_idle: int = MAX_IDLE) -> None:
        self._max_idle = max_idle
        self._lock = threading.Lock()  # guards the two fields below
        self._idle: list[tuple[int, int, mmap.mmap]] = []  # (bytes, a number that orders equal ones, memory), sorted
        self._count = 0
        # Filled by finalizers, which may run anywhere and so take no lock.
        self._returned: deque[mmap.mmap] = deque()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised contiguous tensor on the CPU; its memory comes back when nothing refers to it any more."""
        count = math.prod(shape)
        size = count * dtype.itemsize
        with torch.inference_mode(False):  # whoever gets it may write to it in either mode
            if size < LARGE:
                return torch.empty(shape, dtype=dtype)
            memory = self._take(size)
            lent = (ctypes.c_char * len(memory)).from_buffer(memory)
            weakref.finalize(lent, self._returned.append, memory).atexit = False
            return torch.frombuffer(lent, dtype=dtype, count=count).view(shape)

    @property
    def idle_bytes(self) -> int:
        """Bytes that wait for the next tensor."""
        with self._lock:
            self._settle()
            return sum(size for size, _, _ in self._idle)

    def _take(self, size: int) -> mmap.mmap:
        step = max(mmap.PAGESIZE, 1 << (size.bit_length() - STEP.bit_length()))
        rounded = -(-size // step) * step
        with self._lock:
            self._settle()
            place = bisect_left(self._idle, (rounded, -1))
            if place < len(self._idle) and self._idle[place][0] <= 2 * rounded:
                return self._idle.pop(place)[2]
        return mmap.mmap(-1, rounded, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def _settle(self) -> None:
        """Takes in what came back; what is too much goes to the system, smallest first. Locked."""
        while self._returned:
            memory = self._returned.popleft()
            self._count += 1
            insort(self._idle, (len(memory), self._count, memory))
        total = sum(size for size, _, _ in self._idle)
        while total > self._max_idle:
            total -= self._idle.pop(0)[0]


RECYCLER = Recycler()


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised contiguous tensor; over recycled memory when it is large and on the CPU."""
    if device.type == "cpu":
        return RECYCLER.empty(shape, dtype)
    return torch.empty(shape, dtype=dtype, device=device)
