"""The naive twins of the disk tier and of the device tier: dicts of slots. Tests hold the clever ones against them."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence

from kvstore.block import Header, address_of
from kvstore.errors import TierError
from kvstore.tensors.streams import CallerStream, Event, Stream
from kvstore.tiers import rebuild
from kvstore.tiers.base import Entry, Problem
from kvstore.tiers.catalog import Change, MemoryCatalog


class NaiveTier:
    """``Tier`` in plain memory; forgets all when it is closed. See ``base.Tier`` for what each method promises."""

    vault = None  # nothing leaves memory

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        self._slots: dict[int, bytearray | int] = {}  # bytes, or only the size of a slot that was not written yet
        self._next = 1
        self._catalog = MemoryCatalog()

    @property
    def capacity(self) -> int:
        """Byte budget."""
        return self._capacity

    @property
    def used(self) -> int:
        """Bytes of all slots in use."""
        with self._lock:
            return sum(slot if isinstance(slot, int) else len(slot) for slot in self._slots.values())

    def reserve(self, slot_bytes: int) -> int | None:
        """See ``Tier``."""
        if self.used + slot_bytes > self._capacity:
            return None
        with self._lock:
            self._next += 1
            self._slots[self._next] = slot_bytes
            return self._next

    def headroom(self, slot_bytes: int) -> int:
        """See ``Tier``."""
        return self.capacity - self.used

    def same_class(self, address: int, slot_bytes: int) -> bool:
        """See ``Tier``. Room is room here, if there is enough of it."""
        return self._size(address) >= slot_bytes

    def neighbours(self, address: int) -> Sequence[int]:
        """See ``Tier``. A slot for every size may need them all."""
        return list(self._slots)

    def free(self, address: int) -> None:
        """See ``Tier``."""
        with self._lock:
            del self._slots[address]

    def write(self, address: int, slot: memoryview) -> None:
        """See ``Tier``."""
        size = self._size(address)
        if len(slot) > size:
            raise TierError("no such place in a slot")
        self._slots[address] = bytearray(bytes(slot).ljust(size, b"\0"))

    def read(self, address: int, offset: int, buffer: memoryview) -> None:
        """See ``Tier``."""
        slot = self._slots.get(address)
        if not isinstance(slot, bytearray) or offset < 0 or offset + len(buffer) > len(slot):
            raise TierError("no such place in a slot")
        buffer[:] = slot[offset : offset + len(buffer)]

    def _size(self, address: int) -> int:
        slot = self._slots.get(address)
        if slot is None:
            raise TierError("no such slot")
        return slot if isinstance(slot, int) else len(slot)

    def commit(self, written: Sequence[tuple[int, Header]]) -> None:
        """See ``Tier``."""
        self._catalog.apply(Change(added=written))

    def forget(self, sequences: Iterable[int]) -> None:
        """See ``Tier``."""
        self._catalog.apply(Change(forgotten=list(sequences)))

    def erase(self, addresses: Sequence[int]) -> None:
        """See ``Tier``. Freed slots are gone already."""
        for address in addresses:
            self._slots[address] = bytearray(self._size(address))

    def load(self) -> Iterator[Entry]:
        """See ``Tier``. Nothing is there at open."""
        return self._catalog.snapshot().entries()

    def tokens(self, sequence: int) -> bytes | None:
        """See ``Tier``."""
        found = self._catalog.tokens(sequence)
        return found if isinstance(found, bytes) else None

    def touch(self, sequences: Iterable[int], now: float) -> None:
        """See ``Tier``."""
        self._catalog.apply(Change(used=dict.fromkeys(sequences, now)))

    def remember(self, name: str, value: str) -> None:
        """See ``Tier``."""
        self._catalog.apply(Change(memos={name: value}))

    def recall(self, name: str) -> str | None:
        """See ``Tier``."""
        return self._catalog.recall(name)

    def verify(self) -> Iterator[Problem]:
        """See ``Tier``."""
        for problem, _ in rebuild.check(self.read, self._catalog.snapshot().entries(), self.tokens):
            yield problem

    def close(self) -> None:
        """See ``Tier``."""
        self._slots.clear()


class NaiveDevice:
    """``DeviceSlots`` in plain memory, each slot on its own. See ``base.DeviceSlots`` for what each method promises."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._slots: dict[int, bytearray] = {}
        self._events: list[Event] = []  # of whatever slot: who waits, waits for all
        self._next = 1

    @property
    def used(self) -> int:
        """See ``DeviceSlots``."""
        return sum(map(len, self._slots.values()))

    def reserve(self, slot_bytes: int) -> int | None:
        """See ``DeviceSlots``."""
        if self.used + slot_bytes > self.capacity:
            return None
        self._next += 1
        self._slots[self._next] = bytearray(slot_bytes)
        return self._next

    def same_class(self, address: int, slot_bytes: int) -> bool:
        """See ``DeviceSlots``."""
        return len(self._slots[address]) >= slot_bytes

    def neighbours(self, address: int) -> Sequence[int]:
        """See ``DeviceSlots``."""
        return list(self._slots)

    def free(self, address: int) -> None:
        """See ``DeviceSlots``."""
        del self._slots[address]

    def pointer(self, address: int) -> int:
        """See ``DeviceSlots``."""
        return address_of(self._slots[address])

    def memory(self, address: int) -> memoryview:
        """See ``DeviceSlots``."""
        return memoryview(self._slots[address])

    def ready(self, address: int, stream: Stream) -> None:
        """See ``DeviceSlots``."""
        for event in self._events:
            stream.wait(event)

    def note(self, address: int, *events: Event) -> None:
        """See ``DeviceSlots``."""
        self._events += events

    def erase(self, addresses: Sequence[int]) -> Event:
        """See ``DeviceSlots``; at once, and so it blocks."""
        for event in self._events:
            event.wait()
        for address in addresses:
            self._slots[address][:] = bytes(len(self._slots[address]))
        return CallerStream().record()

    def upload(self, address: int, source: memoryview) -> Event:
        """See ``DeviceSlots``; at once, and so it blocks."""
        for event in self._events:
            event.wait()
        self._slots[address][: len(source)] = source
        return CallerStream().record()

    def gauges(self) -> dict[str, int]:
        """See ``DeviceSlots``."""
        return {"device_capacity": self.capacity, "device_missing_bytes": 0}

    def close(self) -> None:
        """See ``DeviceSlots``."""
        self._slots.clear()
