"""The daemon's arenas as a client has them: mapped once, looked into for as long as anything refers to them."""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import NamedTuple

from kvstore.daemon.arenas import sealed
from kvstore.errors import TierError


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


class Mapped(NamedTuple):
    """One arena: its bytes, and where they begin."""

    view: memoryview
    base: int


def mapped(fd: int, size: int, writable: bool) -> Mapped:
    """Maps an arena; closes the descriptor. Raises ``TierError`` when it is not of a fixed size: who could shrink it
    could have this process killed."""
    try:
        if not sealed(fd, writable) or os.fstat(fd).st_size < size:
            raise TierError("the daemon sent memory that is not sealed")
        prot = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        memory = mmap.mmap(fd, size, prot=prot)
    except (OSError, ValueError) as error:
        raise TierError(f"an arena of {size} bytes cannot be mapped: {error}") from error
    finally:
        os.close(fd)
    return Mapped(memoryview(memory), base_of(memory))
