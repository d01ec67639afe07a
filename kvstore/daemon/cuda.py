"""Pins for CUDA. Of a client, this alone imports torch: where the caller asks for a device, or uses one already."""

from __future__ import annotations

from typing import Any

import torch

from kvstore.daemon.pinning import Both
from kvstore.tiers.device import CudaPins, present

PORTABLE, READ_ONLY = 1, 8  # cudaHostRegister: pinned for every device; memory that this process cannot write


class SharedPins(CudaPins):
    """``Pins`` for memory that is shared with a daemon."""

    def __init__(self, device: str, flags: int) -> None:
        super().__init__(device)
        self._flags = flags

    def pin(self, address: int, size: int) -> bool:
        """See ``Pins``."""
        return self._call(lambda: _cuda().cudaHostRegister(address, size, self._flags))

    def _unregister(self, address: int) -> Any:
        for number in occupied():  # loads that are over may have copies under way, to whatever device
            torch.cuda.synchronize(number)
        return super()._unregister(address)


def _cuda() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def pins(device: str) -> Both | None:
    """For ``device``, "cuda" or "cuda:1"; None when it is not there."""
    return Both(SharedPins(device, PORTABLE | READ_ONLY), SharedPins(device, PORTABLE)) if present(device) else None


def occupied() -> list[int]:
    """Devices that torch has memory on in this process. Starts none up; only when CUDA has started."""
    try:
        return [number for number in range(torch.cuda.device_count()) if torch.cuda.memory_reserved(number)]
    except RuntimeError:  # an allocator of somebody's own, which does not say
        return [torch.cuda.current_device()]
