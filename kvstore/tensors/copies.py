"""Many copies out of host memory at once: one call of the CUDA driver for all of them, without Python's lock.

A copy that Python asks for by itself holds the lock for about as long as the link takes for half a mebibyte, and gives
it away and takes it back each time, which the threads of an engine make expensive.
"""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from typing import Any

import numpy as np

log = logging.getLogger("kvstore")

_STREAM_ORDER = 1  # CU_MEMCPY_SRC_ACCESS_ORDER_STREAM: sources are read when the stream comes to them


class _Attributes(ctypes.Structure):
    """CUmemcpyAttributes."""

    _fields_ = (
        ("source_order", ctypes.c_int),
        ("source_hint", ctypes.c_int * 2),
        ("target_hint", ctypes.c_int * 2),
        ("flags", ctypes.c_uint),
    )


def copy(targets: np.ndarray, sources: np.ndarray, sizes: np.ndarray) -> None:
    """``sizes`` bytes each between addresses in host memory. All are int64 arrays; done when it returns."""
    for target, source, size in zip(targets.tolist(), sources.tolist(), sizes.tolist(), strict=True):
        ctypes.memmove(target, source, size)


def copy_to_device(targets: np.ndarray, sources: np.ndarray, sizes: np.ndarray, stream: int) -> None:
    """``sizes`` bytes each from host memory to the device of ``stream``, a CUDA stream's handle, in its order.

    All are int64 arrays. Whoever owns the memory keeps it until the stream is through with it. Raises ``RuntimeError``
    where the driver refuses, as torch would.
    """
    driver = _driver()
    context = ctypes.c_void_p()
    _check(driver.cuStreamGetCtx(ctypes.c_void_p(stream), ctypes.byref(context)))
    _check(driver.cuCtxPushCurrent_v2(context))  # this thread may not have used the device before
    try:
        if not (len(sizes) > 1 and _together(driver, targets, sources, sizes, stream)):
            for target, source, size in zip(targets.tolist(), sources.tolist(), sizes.tolist(), strict=True):
                copied = ctypes.c_uint64(target), ctypes.c_void_p(source), ctypes.c_size_t(size)
                _check(driver.cuMemcpyHtoDAsync_v2(*copied, ctypes.c_void_p(stream)))
    finally:
        driver.cuCtxPopCurrent_v2(ctypes.byref(context))


def _together(driver: Any, targets: np.ndarray, sources: np.ndarray, sizes: np.ndarray, stream: int) -> bool:
    """Whether all were asked for in one call, which drivers have from CUDA 12.8 on."""
    if not hasattr(driver, "cuMemcpyBatchAsync"):
        return False
    arrays = [np.ascontiguousarray(array, dtype=np.int64) for array in (targets, sources, sizes)]
    attributes, first, failed = _Attributes(source_order=_STREAM_ORDER), ctypes.c_size_t(0), ctypes.c_size_t()
    error = driver.cuMemcpyBatchAsync(
        *(ctypes.c_void_p(array.ctypes.data) for array in arrays),
        ctypes.c_size_t(len(sizes)),
        ctypes.byref(attributes),
        ctypes.byref(first),
        ctypes.c_size_t(1),
        ctypes.byref(failed),
        ctypes.c_void_p(stream),
    )
    if error:  # one by one they may go, and if not they say why
        log.debug("copies are asked for one by one: CUDA's error %d", error)
    return not error


def _check(error: int) -> None:
    if error:
        raise RuntimeError(f"CUDA's driver refuses a copy: error {error}")


@cache
def _driver() -> Any:
    """The library that torch has loaded."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise RuntimeError(f"there is no CUDA driver: {error}") from None
