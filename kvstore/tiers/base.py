"""The ports of the tiers: of one that keeps sealed blocks beyond the host's memory, of one that hosts share, of the
device's memory, and of what keeps host memory in place for the device.

A ``Tier`` moves whole slots and byte ranges of slots between its medium and buffers that the caller owns. It knows
addresses, not chains: what a block is for stands in its header and in the index. Where a method says so it is called
under the store's lock and does no I/O worth waiting for; all others may be called from any thread without that lock.
A method that fails raises ``TierError`` and leaves nothing visible.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from kvstore.block import Header
from kvstore.errors import TierError
from kvstore.layout import Layout
from kvstore.tiers.seal import Envelope
from kvstore.vault import Vault

if TYPE_CHECKING:
    from kvstore.tensors.streams import Event, Stream


class Entry(NamedTuple):
    """A block that the tier holds, as its index knows it. ``used`` is the last use that was written down.

    ``root``: its parent is no block but a chain's root key. ``form`` is the header's form of keys. ``seal``: 0, or it
    is sealed with a key that is not there, whose mark this is (``Key.mark``); key and parent cannot be told then.
    """

    sequence: int
    address: int
    key: bytes
    parent: bytes
    namespace: bytes
    tenant: str
    owner: str
    layout: Layout
    tokens: int
    stride: int
    created: float
    expires: float
    used: float
    root: bool
    form: str
    seal: int


@dataclass(frozen=True, slots=True)
class Problem:
    """What ``verify`` found wrong, in a sentence without token ids or text."""

    address: int
    key: str  # hex, empty when the header cannot be read
    what: str


class Tier(Protocol):
    """Can it hold, put, get a byte range, drop, what it uses. Blocks are named by their header's ``sequence``."""

    @property
    def vault(self) -> Vault | None:
        """Who writes a block has this seal its payload and its header before; None: they are written as they are."""

    @property
    def capacity(self) -> int:
        """Byte budget; what the tier uses never exceeds it, index included."""

    @property
    def used(self) -> int:
        """Bytes that the tier takes on its medium now, index included."""

    def reserve(self, slot_bytes: int) -> int | None:
        """Address of a free slot of the class ``slot_bytes``, now the caller's; None when there is no room.

        Under the store's lock. Never evicts: the caller picks victims, frees them, asks again.
        """

    def headroom(self, slot_bytes: int) -> int:
        """Bytes that ``reserve`` can give in slots of this class before something must go. Under the store's lock."""

    def same_class(self, address: int, slot_bytes: int) -> bool:
        """Whether freeing the slot at ``address`` makes room for ``slot_bytes`` at once. Under the store's lock."""

    def neighbours(self, address: int) -> Sequence[int]:
        """Addresses in use that must all be freed before the space around ``address`` can serve another class.

        Under the store's lock.
        """

    def free(self, address: int) -> None:
        """Gives a slot back; its bytes may stay until they are overwritten. Under the store's lock."""

    def write(self, address: int, slot: memoryview) -> None:
        """Writes a slot (header area and payload; length a multiple of 4096, memory aligned so). Not yet durable."""

    def commit(self, written: Sequence[tuple[int, Header]]) -> None:
        """Makes written slots (address, header) durable, then indexes them durably, in this order."""

    def read(self, address: int, offset: int, buffer: memoryview) -> None:
        """Fills ``buffer`` from byte ``offset`` of the slot (multiples of 4096). A short read is a ``TierError``."""

    def forget(self, sequences: Iterable[int]) -> None:
        """Takes blocks out of the index, at the latest with the next commit (slots are freed apart)."""

    def erase(self, addresses: Sequence[int]) -> None:
        """Destroys the bytes of slots that the caller still owns, of all free slots, and every trace of forgotten
        blocks in the index. Durable when it returns; the caller frees the slots afterwards."""

    def load(self) -> Iterator[Entry]:
        """The blocks that the index knows, in order of sequence (parents before children). Called once, at open. For
        those whose ``seal`` is not 0 there is no key: they can be forgotten, and no more."""

    def tokens(self, sequence: int) -> bytes | None:
        """Token bytes of an indexed block, from the index, without reading its slot. Microseconds."""

    def touch(self, sequences: Iterable[int], now: float) -> None:
        """Notes that blocks were used; written down with one of the next commits, at the latest at close."""

    def remember(self, name: str, value: str) -> None:
        """Keeps a small string beside the blocks."""

    def recall(self, name: str) -> str | None:
        """The string kept under ``name``."""

    def verify(self) -> Iterator[Problem]:
        """Reads every indexed block and checks it; yields what is wrong."""

    def close(self) -> None:
        """Makes the index durable and lets go of everything."""


class Missing(TierError):
    """A part of a block is not where it was: whoever holds it let it go."""


class Copy(NamedTuple):
    """A block in a remote tier: of how many parts it is, what they take in all, and how many seconds it lives."""

    key: bytes
    parts: int
    bytes: int
    ttl: float


class Wanted(NamedTuple):
    """One part of a block, and where to put it: ``buffer`` is as long as the part."""

    key: bytes
    part: int
    buffer: memoryview


Look = Callable[[Sequence[tuple[bytes, int, Envelope | None]]], None]  # key, number of parts, None where unsound


class Remote(Protocol):
    """Blocks that hosts share, somewhere behind a network: a header and parts by key.

    A block is there from when its header is, which comes last; any part may go at any time. Each call takes ``seconds``
    at most, whatever the other side does, and raises ``TierError`` where it fails. Any thread, without the store's
    lock.
    """

    @property
    def place(self) -> str:
        """Where it is, without secrets."""

    def find(self, keys: Sequence[bytes], seconds: float) -> list[Envelope | None]:
        """The headers of blocks; None for what is not there, or is not sound."""

    def read(self, wanted: Sequence[Wanted], seconds: float) -> list[TierError | None]:
        """Fills buffers; for each what is wrong with it: ``Missing``, ``Corrupt`` or nothing."""

    def refresh(self, copies: Sequence[Copy], seconds: float) -> list[bool]:
        """Which blocks are there whole; those live ``ttl`` seconds from now."""

    def put(self, copy: Copy, envelope: Envelope, parts: Sequence[memoryview], seconds: float) -> None:
        """Stores a block. What was used longest ago may go for it."""

    def drop(self, copies: Sequence[Copy], seconds: float) -> int:
        """Destroys blocks; how many were there."""

    def scan(self, look: Look, seconds: float) -> None:
        """Calls ``look`` with all blocks, some at a time, and with parts that have no header (None)."""

    def reset(self) -> None:
        """Ends all connections, those in use too; the next call makes new ones."""

    def gauges(self) -> dict[str, int]:
        """``used``: bytes that all hosts together have there, 0 where nobody counts. ``capacity``: the budget, or 0.
        ``refused``: headers and parts without the right proof so far."""

    def close(self) -> None:
        """Ends all connections for good."""


class DeviceSlots(Protocol):
    """Slots in the device's memory. Bytes are brought and read in streams, by whoever has a slot, not by the tier.

    **Events before reuse**: who has a stream read or write a slot calls ``ready`` before, and ``note`` before others
    get the slot. So no slot is written before those have read it who had it earlier, and none is read before it is
    written. ``reserve``, ``same_class``, ``neighbours`` and ``free`` are called under the store's lock, ``note``
    anywhere, all others without it; none blocks but ``close``.
    """

    @property
    def capacity(self) -> int:
        """Bytes of all slots together, at most; 0 where there is no device or no memory on it."""

    @property
    def used(self) -> int:
        """Bytes of the pool that are cut into slots."""

    def reserve(self, slot_bytes: int) -> int | None:
        """Address of a free slot of the class ``slot_bytes``; None when there is no room. Never evicts."""

    def same_class(self, address: int, slot_bytes: int) -> bool:
        """Whether freeing ``address`` makes room for ``slot_bytes``."""

    def neighbours(self, address: int) -> Sequence[int]:
        """Addresses in use that must all be freed before the space around ``address`` can serve another class."""

    def free(self, address: int) -> None:
        """Gives a slot back, at once: streams may still be at work on it."""

    def pointer(self, address: int) -> int:
        """Where the slot begins in the device's memory. Under the store's lock, or by whoever has the slot."""

    def memory(self, address: int) -> Any:
        """The slot's bytes as the device has them, a uint8 tensor where there is torch. As ``pointer``."""

    def ready(self, address: int, stream: Stream) -> None:
        """What is asked of ``stream`` from now on starts after all that was noted for the slot's bytes."""

    def note(self, address: int, *events: Event) -> None:
        """Notes that streams are done with the slot when they reach ``events``."""

    def erase(self, addresses: Sequence[int]) -> Event:
        """Zeroes slots that the caller still owns, behind what was noted for them; an event for when it is over."""

    def upload(self, address: int, source: memoryview) -> Event:
        """Copies host memory, which stays as it is until the event, to the beginning of a slot, behind what was noted
        for the slot, and notes it. Raises ``TierError``."""

    def gauges(self) -> dict[str, int]:
        """``device_capacity`` and ``device_missing_bytes``: what of the wanted bytes could not be had."""

    def close(self) -> None:
        """Waits for all events, lets go of the memory; ``memory`` that is still held keeps it alive."""


class Pins(Protocol):
    """Keeps host memory in place, so that the device copies it without help. Called by one thread, never locked."""

    def pin(self, address: int, size: int) -> bool:
        """False: it could not be pinned, and works all the same, slower."""

    def unpin(self, address: int) -> None:
        """Before memory that was pinned at ``address`` goes."""
