"""The device tier: slots in one pool of the device's memory; plain memory where the device is the CPU.

The pool is taken when the tier is opened, never later: an engine that fills the device afterwards takes nothing from
the tier, nor the tier from it. Extents of slots of one size class are cut out of it, as large as the room between the
others allows.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch

from kvstore.errors import TierError
from kvstore.tensors.streams import CudaStream, Event, Stream, ThreadStream
from kvstore.tiers.slab import SLOT_BITS, Extent, Slab

log = logging.getLogger("kvstore")

MIN_POOL = 1 << 20
MIN_EXTENT = 1 << 20
MAX_EXTENT = 256 << 20
FEW_EVENTS = 8  # so many are kept before those that are over are looked for
_PORTABLE = 1  # cudaHostRegister: pinned for every device


def _take(size: int, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # or only threads in that mode could write to it
        pool = torch.empty(size, dtype=torch.uint8, device=device)
    if pool.is_cuda:  # torch may have had it before: what it was used for is over for its own stream only
        torch.cuda.synchronize(device)
    return pool


def present(device: torch.device | str) -> bool:
    """Whether this machine has the device."""
    device = torch.device(device)
    return device.type != "cuda" or (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count())


class DeviceTier:
    """``DeviceSlots`` in one uint8 tensor. See ``base.DeviceSlots`` for what each method promises.

    A pool that cannot be had is halved until it fits; below ``MIN_POOL``, and where there is no such device, the tier
    has capacity 0. Either is a gauge and a log line, never an error.
    """

    def __init__(self, capacity: int, device: str, take: Callable[[int, torch.device], torch.Tensor] = _take) -> None:
        """``take(size, device)`` gives uint8 [size], or raises ``RuntimeError`` as torch does."""
        self.device = torch.device(device)
        self._wanted = capacity
        self._pool = self._open(capacity, take)
        size = 0
        if self._pool is not None:
            size, self.device = len(self._pool), self._pool.device  # "cuda" is another one for every thread
        self._slab = Slab(size, min(max(size // 16, MIN_EXTENT), MAX_EXTENT), self._grow, self._shrink)
        self._starts: dict[int, int] = {}  # extent -> where it begins in the pool
        self._lock = threading.Lock()  # guards the fields below; taken under the store's lock, never the other way
        self._events: dict[int, list[Event]] = {}  # of slots
        self._before: dict[int, list[Event]] = {}  # of extents: of whom had these bytes before, under other addresses
        self._left: list[Event] = []  # of extents that are gone
        self._streams: dict[str, Stream] = {}  # the tier's own, by name

    def _open(self, capacity: int, take: Callable[[int, torch.device], torch.Tensor]) -> torch.Tensor | None:
        if not present(self.device):
            log.warning("there is no device %s: nothing is kept on it", self.device)
            return None
        size, reason = capacity, ""
        while size >= MIN_POOL:
            try:
                pool = take(size, self.device)
            except RuntimeError as error:
                reason = str(error).partition("\n")[0]
                size = size // 2 & -4096
                continue
            if size < capacity:
                log.warning("the device tier has %d bytes instead of %d: %s", size, capacity, reason)
            return pool
        if capacity:
            log.warning("there is no memory on %s, nothing is kept on it: %s", self.device, reason or "too little")
        return None

    @property
    def capacity(self) -> int:
        """See ``DeviceSlots``."""
        return self._slab.capacity

    @property
    def used(self) -> int:
        """See ``DeviceSlots``."""
        return self._slab.used

    def gauges(self) -> dict[str, int]:
        """See ``DeviceSlots``."""
        return {"device_capacity": self.capacity, "device_missing_bytes": self._wanted - self.capacity}

    # -- slots, under the store's lock -------------------------------------------------------------------------

    def reserve(self, slot_bytes: int) -> int | None:
        """See ``DeviceSlots``."""
        address = self._slab.allocate(slot_bytes)
        if address is None:  # extents without a slot in use may stand in the way of a larger hole
            for extent in [extent for extent in self._slab.extents.values() if not extent.live]:
                self._slab.drop(extent)
            address = self._slab.allocate(slot_bytes)
        return address

    def same_class(self, address: int, slot_bytes: int) -> bool:
        """See ``DeviceSlots``."""
        return self._slab.slot_bytes(address) == slot_bytes

    def neighbours(self, address: int) -> Sequence[int]:
        """See ``DeviceSlots``."""
        return self._slab.neighbours(address)

    def free(self, address: int) -> None:
        """See ``DeviceSlots``."""
        self._slab.free(address)

    def pointer(self, address: int) -> int:
        """See ``DeviceSlots``."""
        return 0 if self._pool is None else self._pool.data_ptr() + self._offset(address)

    def memory(self, address: int) -> torch.Tensor:
        """See ``DeviceSlots``."""
        assert self._pool is not None, "the tier is closed"
        return self._pool[self._offset(address) :][: self._slab.slot_bytes(address)]

    def _offset(self, address: int) -> int:
        return self._starts[address >> SLOT_BITS] + self._slab.offset(address)

    def _grow(self, extent: Extent) -> bool:
        """Cuts an extent out of the first hole that is large enough, or a smaller one out of the largest hole."""
        room = start = at = 0
        taken = sorted((self._starts[e.number], e.bytes) for e in self._slab.extents.values())
        for begin, size in [*taken, (self.capacity, 0)]:
            if begin - at > room:
                room, start = begin - at, at
            if room >= extent.bytes:
                break
            at = begin + size
        slots = min(extent.slots, room // extent.slot_bytes)
        if not slots:
            return False
        extent.slots, extent.free = slots, extent.free[-slots:]
        self._starts[extent.number] = start
        with self._lock:
            self._left = _under_way(self._left)
            self._before[extent.number] = list(self._left)
        return True

    def _shrink(self, extent: Extent) -> None:
        del self._starts[extent.number]
        with self._lock:
            self._left += self._before.pop(extent.number)
            for slot in range(extent.slots):
                self._left += self._events.pop(extent.number << SLOT_BITS | slot, ())
            self._left = _under_way(self._left)

    # -- streams -----------------------------------------------------------------------------------------------

    def ready(self, address: int, stream: Stream) -> None:
        """See ``DeviceSlots``."""
        with self._lock:
            before = self._before.get(address >> SLOT_BITS)
            if before:
                before[:] = _under_way(before)
            events = [*(before or ()), *self._events.get(address, ())]
        for event in events:
            if not event.done():
                stream.wait(event)

    def note(self, address: int, *events: Event) -> None:
        """See ``DeviceSlots``."""
        with self._lock:
            noted = self._events.setdefault(address, [])
            if len(noted) >= FEW_EVENTS:
                noted[:] = _under_way(noted)
            noted += events

    def erase(self, addresses: Sequence[int]) -> Event:
        """See ``DeviceSlots``; by one thread at a time. Raises ``TierError``."""
        try:
            stream = self._stream("kvstore-device")
            for address in addresses:
                self.ready(address, stream)
                stream.run(partial(_zero, self.memory(address)))
            event = stream.record()
        except RuntimeError as error:
            raise TierError(f"slots on {self.device} cannot be erased: {error}") from error
        for address in addresses:
            self.note(address, event)
        return event

    def upload(self, address: int, source: memoryview) -> Event:
        """See ``DeviceSlots``. Any thread."""
        try:
            stream = self._stream("kvstore-upload")
            self.ready(address, stream)
            stream.run(partial(_copy, self.memory(address), source))
            event = stream.record()
        except RuntimeError as error:
            raise TierError(f"a slot on {self.device} cannot be filled: {error}") from error
        self.note(address, event)
        return event

    def _stream(self, name: str) -> Stream:
        """One of the tier's own, started by the first who asks."""
        with self._lock:
            if name not in self._streams:
                cuda = self.device.type == "cuda"
                self._streams[name] = CudaStream(self.device) if cuda else ThreadStream(name)
            return self._streams[name]

    def close(self) -> None:
        """See ``DeviceSlots``. Again is no error."""
        with self._lock:
            events = [event for several in (*self._events.values(), *self._before.values()) for event in several]
            events += self._left
            streams = list(self._streams.values())
        ends: list[Callable[[], None]] = [partial(_wait, events), *(stream.close for stream in streams)]
        for end in ends:
            try:
                end()
            except RuntimeError as error:
                log.warning("the device tier could not be closed well: %s", error)
        self._pool = None


def _zero(memory: torch.Tensor) -> None:
    memory.zero_()


def _copy(memory: torch.Tensor, source: memoryview) -> None:
    memory[: len(source)].copy_(torch.frombuffer(source, dtype=torch.uint8), non_blocking=True)


def _wait(events: Iterable[Event]) -> None:
    for event in events:
        event.wait()


def _under_way(events: Iterable[Event]) -> list[Event]:
    return [event for event in events if not event.done()]


def _cuda() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


class CudaPins:
    """``Pins`` for copies to and from one CUDA device."""

    def __init__(self, device: str) -> None:
        """``device`` is there; without a number it is the calling thread's."""
        _, _, number = device.partition(":")
        self._device = torch.device("cuda", int(number) if number else torch.cuda.current_device())

    def pin(self, address: int, size: int) -> bool:
        """See ``Pins``."""
        return self._call(lambda: _cuda().cudaHostRegister(address, size, _PORTABLE))

    def unpin(self, address: int) -> None:
        """See ``Pins``."""
        self._call(partial(self._unregister, address))

    def _unregister(self, address: int) -> Any:
        torch.cuda.synchronize(self._device)  # a draft that was dropped may have a copy on its way there
        return _cuda().cudaHostUnregister(address)

    def _call(self, call: Callable[[], Any]) -> bool:
        """CUDA keeps the error of a call that failed for the calling thread, and torch would raise it for the next
        kernel that this thread launches; but this thread is the host tier's own, and launches none."""
        try:
            with torch.cuda.device(self._device):  # a thread that names none would start up device 0
                return int(call()) == 0
        except (RuntimeError, AssertionError) as error:  # CUDA does not start
            log.debug("no call to CUDA: %s", error)
            return False
