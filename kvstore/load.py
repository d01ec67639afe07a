"""The life of a load: what a match found is brought to host memory, layer 0 of all blocks first, and checked."""

from __future__ import annotations

import ctypes
import logging
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

from kvstore.block import Header, address_of, bad_pieces, copy_checked, decode_header
from kvstore.errors import Corrupt, TierError
from kvstore.families import NONE
from kvstore.match import Match
from kvstore.mover import Mover, Priority
from kvstore.residency import Residency, Resident

log = logging.getLogger("kvstore")

PART_BYTES = 2 << 20  # a block is read in runs of layers of about this size
LEASE_SHARE = 0.75  # of the host tier's capacity that leases may hold
DEADLINE = 30.0  # seconds that a layer is waited for before it counts as failed


class Piece(NamedTuple):
    """One block's keys and values of one layer: ``[head][stride][dim]``, of which the first ``tokens`` are valid.

    The views are read-only in spirit: they are the store's own memory, held by the load's lease.
    """

    keys: memoryview
    values: memoryview
    stride: int
    tokens: int


class Fetch:
    """One block on its way from disk to a host slot; one fetch serves all who wait for the block."""

    def __init__(self, number: int, resident: Resident, view: memoryview, address: int, header_bytes: int) -> None:
        self.number = number
        self.resident = resident
        self.view = view
        self.address = address
        self.layout = resident.layout
        self.offsets = self.layout.layer_offsets(resident.stride)
        self.header_bytes = header_bytes
        self.parts = _parts(self.offsets)
        self.header: Header | None = None
        self.progress = threading.Condition()  # guards the two fields below
        self.ready = 0  # layers that are in memory and verified, as bits
        self.failed = False
        self.left = len(self.parts)  # parts that have not settled; guarded by progress

    def wait(self, layer: int, deadline: float) -> bool:
        """Until the layer is there (True), the fetch has failed, or the deadline (monotonic) has passed (False)."""
        bit = 1 << layer
        with self.progress:
            while not self.ready & bit and not self.failed:
                if not self.progress.wait(max(deadline - time.monotonic(), 0)):
                    return bool(self.ready & bit)
            return bool(self.ready & bit)

    def wait_all(self, deadline: float) -> bool:
        """``wait`` for every layer."""
        return all(self.wait(first, deadline) for first, _ in self.parts)


class Loader:
    """Starts fetches and settles them. One per store."""

    def __init__(self, residency: Residency, mover: Mover) -> None:
        self._residency = residency
        self._mover = mover
        self._fetches: dict[int, Fetch] = {}  # guarded by residency.lock

    def load(self, match: Match) -> Load:
        """Starts bringing a match's blocks to host memory; takes over its lease. Any thread."""
        residency = self._residency
        sources: list[tuple[Resident | Fetch, int]] = []
        started: list[Fetch] = []
        with residency.lock:
            room = int(residency.host.capacity * LEASE_SHARE) - residency.leased_bytes()
            for number, tokens in match.blocks:
                source: Resident | Fetch | None = residency.residents.get(number) or self._fetches.get(number)
                if source is None:
                    room -= match.layout.full_slot_bytes
                    source = self._start(number) if room >= 0 else None
                    if source is None:
                        residency.counters.add("loads_cut")
                        break
                    started.append(source)
                sources.append((source, tokens))
        for order, fetch in enumerate(started):
            self._submit(fetch, 0, order)
        views = [s.view if isinstance(s, Fetch) else residency.host.view(s.address) for s, _ in sources]
        return Load(match, sources, views)

    def _start(self, number: int) -> Fetch | None:
        residency, index = self._residency, self._residency.index
        address, stride = index.disk[number], index.stride[number]
        if address == NONE:
            return None
        layout = index.kind_of(number).layout
        slot = residency.reserve_host(layout.class_bytes(stride))
        if slot is None:
            return None
        resident = Resident(slot, layout, stride, residency.payload(number), clean=True)
        fetch = Fetch(number, resident, residency.host.view(slot), address, layout.header_bytes)
        residency.hold([number])
        self._fetches[number] = fetch
        return fetch

    def _submit(self, fetch: Fetch, part: int, order: int) -> None:
        if not self._mover.submit(Priority.DEMAND, (part, order), lambda: self._run(fetch, part, order)):
            self._fail(fetch, TierError("the store is closing"))
            self._part_over(fetch)

    def _run(self, fetch: Fetch, part: int, order: int) -> None:
        first, last = fetch.parts[part]
        try:
            if not fetch.failed:
                self._read(fetch, part)
                with fetch.progress:
                    fetch.ready |= (1 << last) - (1 << first)
                    fetch.progress.notify_all()
        except TierError as error:
            self._fail(fetch, error)
        if part == 0:
            for following in range(1, len(fetch.parts)):
                self._submit(fetch, following, order)
        self._part_over(fetch)

    def _part_over(self, fetch: Fetch) -> None:
        with fetch.progress:
            fetch.left -= 1
            over = fetch.left == 0
        if over:
            self._settle(fetch)

    def _fail(self, fetch: Fetch, error: TierError) -> None:
        """A part could not be read or is not what was written: waiters learn it at once."""
        with fetch.progress:
            first_failure = not fetch.failed
            fetch.failed = True
            fetch.progress.notify_all()
        if first_failure:
            kind = "corrupt_blocks" if isinstance(error, Corrupt) else "failed_reads"
            self._residency.counters.add(kind)
            log.warning("a block on disk is dropped: %s", error)

    def abort(self) -> None:
        """The mover is closed and its jobs are gone: fetches that have not settled fail now."""
        with self._residency.lock:
            left = list(self._fetches.values())
        for fetch in left:
            self._fail(fetch, TierError("the store was closed"))
            self._settle(fetch)

    def _read(self, fetch: Fetch, part: int) -> None:
        """Reads one part (the first with the header) into the slot and checks every piece of it."""
        tier = self._residency.disk
        assert tier is not None
        first, last = fetch.parts[part]
        begin = 0 if part == 0 else fetch.header_bytes + fetch.offsets[first]
        end = fetch.header_bytes + fetch.offsets[last]
        tier.read(fetch.address, begin, fetch.view[begin:end])
        self._residency.counters.add("disk_read_bytes", end - begin)
        if part == 0:
            fetch.header = self._check_header(fetch)
        assert fetch.header is not None
        payload = fetch.view[fetch.header_bytes :]
        bad = next(bad_pieces(fetch.header, payload, first, last), None)
        if bad is not None:
            raise Corrupt(f"checksum of layer {bad[0]} differs")

    def _check_header(self, fetch: Fetch) -> Header:
        header = decode_header(fetch.view[: fetch.header_bytes])
        residency = self._residency
        with residency.lock:
            index, number = residency.index, fetch.number
            kind = index.kind_of(number)
            expected = (index.key[number], kind.namespace, kind.layout, fetch.resident.stride, index.count[number])
        if (header.key, header.namespace, header.layout, header.stride, header.token_count) != expected:
            raise Corrupt("the slot holds another block than the index says")
        return header

    def _settle(self, fetch: Fetch) -> None:
        """No part runs any more. The block is resident, or a miss from now on.

        A reader may still copy layers that came in well from the slot of a fetch that failed later, so that slot goes
        back with the last lease on the block, not before.
        """
        residency, number, resident = self._residency, fetch.number, fetch.resident
        with residency.lock:
            del self._fetches[number]
            still_there = residency.index.disk[number] == fetch.address
            if still_there and not fetch.failed and fetch.header is not None:
                resident.checksums = fetch.header.checksums
                residency.put_host(number, resident, fetch.header.tokens)
                residency.host_policy.touch(residency.index.chain(number))
            else:
                residency.keep_until_unleased(number, resident)
                if still_there:
                    residency.drop_disk(number)
            residency.unhold([number])
            residency.changed.notify_all()


class Load:
    """A load under way. Methods may be called from one thread at a time; none of them raises for what tiers do."""

    def __init__(self, match: Match, sources: list[tuple[Resident | Fetch, int]], views: list[memoryview]) -> None:
        self.layout = match.layout
        self.tokens = sum(tokens for _, tokens in sources)
        self.tokens_by_tier = match.tokens_by_tier
        self.token_ids = match.token_ids
        self.lease = match.lease
        self._sources = sources
        self._views = views
        self._fetches = [source for source, _ in sources if isinstance(source, Fetch)]

    def wait(self, layer: int, timeout: float | None = None) -> bool:
        """True: the layer of every block is in private host memory and verified. False: failed, or late."""
        if not self.lease.active:
            return False
        deadline = time.monotonic() + (DEADLINE if timeout is None else timeout)
        return all(fetch.wait(layer, deadline) for fetch in self._fetches)

    def good_tokens(self, layer: int = 0) -> int:
        """Leading tokens up to the first block that is known to have failed at or before ``layer``."""
        good = 0
        bits = (1 << (layer + 1)) - 1
        for source, tokens in self._sources:
            if isinstance(source, Fetch) and source.failed and source.ready & bits != bits:
                break
            good += tokens
        return good

    def pieces(self, layer: int) -> list[Piece]:
        """Keys and values of one layer, block by block, after ``wait(layer)`` has returned True."""
        layout = self.layout
        pieces = []
        for (source, tokens), view in zip(self._sources, self._views, strict=True):
            stride = source.resident.stride if isinstance(source, Fetch) else source.stride
            start = layout.header_bytes + layout.layer_offsets(stride)[layer]
            middle = start + layout.key_bytes(layer, stride)
            end = middle + layout.value_bytes(layer, stride)
            pieces.append(Piece(view[start:middle], view[middle:end], stride, tokens))
        return pieces

    def read_into(self, buffer: memoryview, timeout: float | None = None, check: bool = False) -> int:
        """Copies the payloads of all blocks one after the other into ``buffer``; returns the bytes written.

        Stops before the first block that failed or does not fit. With ``check`` the bytes are checked once more as
        they are copied, where checksums are known (what memory that others can write needs).
        """
        layout = self.layout
        room, written, header = len(buffer), 0, layout.header_bytes
        target = address_of(buffer) if room else 0
        deadline = time.monotonic() + (DEADLINE if timeout is None else timeout)
        for (source, _), view in zip(self._sources, self._views, strict=True):
            if isinstance(source, Fetch):
                if not source.wait_all(deadline):
                    break
                source = source.resident
            size = layout.payload_bytes(source.stride)
            if size > room - written:
                break
            if not check or source.checksums is None:
                ctypes.memmove(target + written, address_of(view) + header, size)
            else:
                payload = view[header : header + size]
                copied = copy_checked(buffer[written : written + size], payload, layout, source.stride)
                if copied != source.checksums:
                    break
            written += size
        return written

    def release(self) -> None:
        """Ends the lease; the pieces must not be used any more. Also happens when the load is dropped."""
        self._views = []
        self.lease.release()


def _parts(offsets: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of layers (first, last + 1) of about ``PART_BYTES``."""
    bounds: list[tuple[int, int]] = []
    first = 0
    for layer in range(1, len(offsets)):
        if offsets[layer] - offsets[first] >= PART_BYTES or layer == len(offsets) - 1:
            bounds.append((first, layer))
            first = layer
    return bounds
