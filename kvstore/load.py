"""A load under way: where its blocks are, which layers are there, what holds them in place until it ends."""

from __future__ import annotations

import ctypes
import time
import weakref
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, Protocol

from kvstore.block import address_of
from kvstore.checksum import copy_digests
from kvstore.errors import BadInput
from kvstore.fetch import Fetch
from kvstore.hot import Hold, Hot, Slot
from kvstore.kinds import Origin
from kvstore.match import Match
from kvstore.residency import Resident

if TYPE_CHECKING:
    from kvstore.tensors.streams import Event, Stream

FEW_EVENTS = 8  # so many more are kept before those that are over are looked for
DEADLINE = 30.0  # seconds that a layer is waited for before it counts as failed


class Source(NamedTuple):
    """One block of a load. ``held``: in host memory or on its way there, seen through ``view``; None: it is on the
    device already, in ``slot``. With both, the slot is this load's to fill."""

    number: int
    tokens: int
    held: Resident | Fetch | None
    view: memoryview | None
    slot: Slot | None
    base: int = 0  # where ``view`` begins in memory
    origin: Origin = Origin()

    @property
    def writer(self) -> str:
        """Who wrote it; empty when that is not known, as of a block from disk before its first layer is there."""
        header = self.held.header if isinstance(self.held, Fetch) else None
        return self.origin.writer if header is None else header.writer

    @property
    def stride(self) -> int:
        """Tokens that the block has room for, where its bytes are."""
        if self.held is None:
            assert self.slot is not None
            return self.slot.stride
        return self.held.resident.stride if isinstance(self.held, Fetch) else self.held.stride

    def whole(self, deadline: float) -> bool:
        """Whether all of it is in host memory, verified, by then (monotonic)."""
        return self.held is not None and (not isinstance(self.held, Fetch) or self.held.wait_all(deadline))


class Piece(NamedTuple):
    """One block's keys and values of one layer: ``[head][stride][dim]``, of which the first ``tokens`` are valid.

    The views are read-only in spirit: they are the store's own memory, held by the load's lease.
    """

    keys: memoryview
    values: memoryview
    stride: int
    tokens: int
    rotated: bool = False  # keys are as turned for the positions of their tokens in the chain


class Place(NamedTuple):
    """Where one block's keys and values of one layer are: memory addresses of ``[head][stride][dim]``.

    ``hot``: they are the device's, in ``slot``. Otherwise they are the host's, and ``slot``, if there is one, is to be
    filled by this load: the block's layers belong at ``slot.keys(layer)``, keys and values in one run.
    ``rotated``: keys are as turned for ``position`` and after, where the block stands in its chain.
    """

    keys: int
    values: int
    stride: int
    tokens: int
    slot: Slot | None = None
    hot: bool = False
    rotated: bool = False
    position: int = 0


class Home(Protocol):
    """What a load needs of the store that it is of."""

    @property
    def hot(self) -> Hot | None:
        """Who knows what is on the device."""

    def load_ended(self, hold: Hold) -> None:
        """The load is over; called by finalizers, so it takes no lock."""


class Load:
    """A load under way. Methods may be called from one thread at a time; none of them raises for what tiers do."""

    def __init__(self, match: Match, sources: list[Source], residency: Home, hold: Hold) -> None:
        self.layout = match.layout
        self.tokens = sum(source.tokens for source in sources)
        self.token_ids, self.skipped = match.token_ids, match.skipped
        self.lease = hold.lease
        self._sources = sources
        self._fetches = [source.held for source in sources if isinstance(source.held, Fetch)]
        self._residency, self._hold = residency, hold
        self._end = weakref.finalize(self, residency.load_ended, hold)
        self._end.atexit = False

    def wait(self, layer: int, timeout: float | None = None) -> bool:
        """True: the layer of every block is in private host memory, or on the device, and verified.

        False: failed, or late.
        """
        if not (self.lease.active and self._end.alive):
            return False
        deadline = time.monotonic() + (DEADLINE if timeout is None else timeout)
        return all(fetch.wait(layer, deadline) for fetch in self._fetches)

    lent = False  # whether somebody else may take away what it holds

    @property
    def sources(self) -> Sequence[Source]:
        """Its blocks."""
        return self._sources

    @property
    def writers(self) -> tuple[str, ...]:
        """Who wrote its blocks, each once, as far as is known by now."""
        return tuple(filter(None, dict.fromkeys(source.writer for source in self._sources)))

    def intact(self) -> bool:
        """Whether all that was copied so far was what it should be: asked after each copy. In the store's own process
        a lease holds what it holds; elsewhere, its holder may have been taken for dead meanwhile."""
        return True

    def good_tokens(self, layer: int = 0) -> int:
        """Leading tokens up to the first block that is known to have failed at or before ``layer``."""
        good = 0
        bits = (1 << (layer + 1)) - 1
        for source in self._sources:
            if isinstance(source.held, Fetch) and source.held.failed and source.held.ready & bits != bits:
                break
            good += source.tokens
        return good

    def tokens_by_tier(self, stop: int, first: int = 0) -> dict[str, int]:
        """Where tokens ``first`` to ``stop`` of the load come from, by tier."""
        tiers = {"device": 0, "host": 0, "disk": 0, "remote": 0}
        start = 0
        for source in self._sources:
            used = max(0, min(start + source.tokens, stop) - max(start, first))
            held = source.held
            tiers["device" if held is None else held.tier if isinstance(held, Fetch) else "host"] += used
            start += source.tokens
        return tiers

    def pieces(self, layer: int) -> list[Piece]:
        """Keys and values of one layer, block by block, after ``wait(layer)`` has returned True.

        Raises ``BadInput`` when a block is on the device only: ``places`` says where.
        """
        layout = self.layout
        pieces = []
        for source in self._sources:
            if source.view is None:
                raise BadInput("a load for the device has no memory views; ask for places")
            stride = source.stride
            start = layout.header_bytes + layout.layer_offsets(stride)[layer]
            middle = start + layout.key_bytes(layer, stride)
            end, rotated = middle + layout.value_bytes(layer, stride), source.origin.rotated
            pieces.append(Piece(source.view[start:middle], source.view[middle:end], stride, source.tokens, rotated))
        return pieces

    def places(self, layer: int) -> list[Place]:
        """``pieces`` as addresses, for kernels, of host or device memory; good until ``release``."""
        layout, places, position = self.layout, list[Place](), self.skipped
        strides: dict[int, tuple[int, int]] = {}  # where the layer begins in a payload, and the size of its keys
        for (base, stride), source in zip(self._bases, self._sources, strict=True):
            if stride not in strides:
                strides[stride] = layout.layer_offsets(stride)[layer], layout.key_bytes(layer, stride)
            start, size = strides[stride]
            keys = base + start
            there = keys, keys + size, stride, source.tokens, source.slot, source.view is None
            places.append(Place(*there, source.origin.rotated, position))
            position += source.tokens
        return places

    @cached_property
    def _bases(self) -> list[tuple[int, int]]:
        """Of each block, where its payload begins in memory or on the device, and its stride."""
        bases = []
        for source in self._sources:
            if source.view is not None:
                base = source.base + self.layout.header_bytes
            else:
                assert source.slot is not None
                base = source.slot.pointer
            bases.append((base, source.stride))
        return bases

    def fetched(self, layer: int) -> tuple[float, float] | None:
        """When this layer was read from disk and checked, first to last block (``time.perf_counter``); None: never."""
        times = [time for fetch in self._fetches if (time := fetch.time_of(layer)) is not None]
        return (min(begin for begin, _ in times), max(end for _, end in times)) if times else None

    def read_into(self, buffer: memoryview, timeout: float | None = None, check: bool = False) -> int:
        """Copies the payloads of all blocks one after the other into ``buffer``; returns the bytes written.

        Stops before the first block that failed, does not fit, or is on the device only. With ``check`` the bytes are
        checked once more as they are copied, where checksums are known (what memory that others can write needs).
        """
        layout = self.layout
        room, written, header = len(buffer), 0, layout.header_bytes
        target = address_of(buffer) if room else 0
        deadline = time.monotonic() + (DEADLINE if timeout is None else timeout)
        for source in self._sources:
            held, view = source.held, source.view
            if held is None or view is None:
                break
            if isinstance(held, Fetch):
                if not held.wait_all(deadline):
                    break
                held = held.resident
            size = layout.payload_bytes(held.stride)
            if size > room - written:
                break
            payload = source.base + header
            if not check or held.checksums is None:
                ctypes.memmove(target + written, payload, size)
            else:
                into = buffer[written : written + size]
                if copy_digests(layout, held.stride, into, target + written, payload) != held.checksums:
                    break
            written += size
        return written if self.intact() else 0

    # -- streams: what reads and writes the blocks behind the caller's back -----------------------------------------

    def ready(self, stream: Stream) -> None:
        """Before ``stream`` reads or fills the load's slots: it waits for those who are not done with them yet.

        Streams of this load wait for each other by themselves.
        """
        hot = self._residency.hot
        for source in self._sources:
            if source.slot is not None and hot is not None:
                hot.tier.ready(source.slot.address, stream)

    def used(self, event: Event) -> None:
        """After a stream was asked to read or fill the load's blocks, wherever they are: when it is done with them.

        Until then they stay where they are in memory, and no stream writes their slots, even if the load ends before.
        """
        self._hold.events.append(event)
        if len(self._hold.events) % FEW_EVENTS == 0:
            self._under_way()

    def keep(self, memory: object) -> None:
        """Memory of somebody else's that the streams use, too: it is not let go before the noted events are reached."""
        self._hold.kept.append(memory)

    def _under_way(self) -> list[Event]:
        self._hold.events = [event for event in self._hold.events if not event.done()]
        return self._hold.events

    def filled(self, tokens: int | None = None) -> None:
        """The slots that were this load's to fill hold all layers of their blocks, or will when the noted events are
        reached: from now on other loads find them. ``tokens``: only of the blocks with the first so many tokens.
        Takes no lock of the store's: a cache that is collected may call this in a thread that holds it."""
        full = self.good_tokens(len(self.layout.layers) - 1)
        full = full if tokens is None else min(full, tokens)
        slots, start = [], 0
        for source in self._sources:
            there = not isinstance(source.held, Fetch) or source.held.complete
            if start < full and source.held is not None and source.slot is not None and there:
                slots.append(source.slot)
            start += source.tokens
        if slots and self._residency.hot is not None:
            self._residency.hot.report(slots, self._under_way())

    def release(self) -> None:
        """Ends the load; its pieces and places must not be used any more. Also happens when it is dropped.

        Its lease goes when the events that ``used`` noted are reached.
        """
        self._sources = []
        self._bases = []
        self._end()
