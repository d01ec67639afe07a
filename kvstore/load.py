"""The life of a load: what a match found is brought to host memory, layer 0 of all blocks first, and checked."""

from __future__ import annotations

import ctypes
import logging
import time
from typing import NamedTuple

from kvstore.block import address_of, bad_pieces, copy_checked, decode_header
from kvstore.errors import Corrupt, TierError
from kvstore.families import NONE
from kvstore.fetch import Fetch
from kvstore.keys import TOKEN_BYTES
from kvstore.match import Match
from kvstore.mover import Mover, Priority
from kvstore.residency import Residency, Resident
from kvstore.room import reserve_host

log = logging.getLogger("kvstore")

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


class Loader:
    """Starts fetches and settles them. One per store."""

    def __init__(self, residency: Residency, mover: Mover) -> None:
        self._residency = residency
        self._mover = mover
        self._fetches: dict[int, Fetch] = {}  # guarded by residency.lock

    def load(self, match: Match) -> Load:
        """Starts bringing a match's blocks to host memory; takes over its lease. Any thread."""
        residency = self._residency
        match.loaded = True
        sources: list[tuple[Resident | Fetch, int]] = []
        started: list[Fetch] = []
        position = 0
        with residency.lock:
            residency.check_open()
            room = int(residency.host.capacity * LEASE_SHARE) - residency.leased_bytes()
            for number, tokens in match.blocks if match.lease.active else ():  # else others may have the numbers by now
                source: Resident | Fetch | None = residency.residents.get(number) or self._fetches.get(number)
                if source is None:
                    room -= match.layout.full_slot_bytes
                    source = self._start(number) if room >= 0 else None
                    if source is None:
                        residency.counters.add("loads_cut")
                        break
                    started.append(source)
                piece = match.token_ids[position : position + tokens * TOKEN_BYTES]
                if not self._promises(source, number, piece):
                    break
                position += len(piece)
                sources.append((source, tokens))
            # Known to the policy from the start, so that one touch of the chain puts all of it in order.
            for fetch in started:
                residency.host_policy.insert(fetch.number, fetch.resident.payload)
            residency.host_policy.touch([number for number, _ in match.blocks])
            views = [s.view if isinstance(s, Fetch) else residency.host.view(s.address) for s, _ in sources]
        for order, fetch in enumerate(started):
            self._submit(fetch, 0, order)
        return Load(match, sources, views)

    def _start(self, number: int) -> Fetch | None:
        residency, index = self._residency, self._residency.index
        address, stride = index.disk[number], index.stride[number]
        if address == NONE:
            return None
        layout = index.kind_of(number).layout
        slot = reserve_host(residency, layout.class_bytes(stride))
        if slot is None:
            return None
        resident = Resident(slot, layout, stride, residency.payload(number), clean=True)
        fetch = Fetch(number, resident, residency.host.view(slot), address, layout.header_bytes)
        residency.hold([number])
        self._fetches[number] = fetch
        return fetch

    def _promises(self, source: Resident | Fetch, number: int, piece: bytes) -> bool:
        """Whether the block starts with these tokens; of one under way its header will tell, or fail it. Locked.

        The key says so already. A hash that is broken must cost hits and never give wrong bytes.
        """
        if isinstance(source, Resident):
            return self._residency.index.tokens_of(number).startswith(piece)
        source.promised.append(piece)
        return source.header is None or source.header.tokens.startswith(piece)

    def _submit(self, fetch: Fetch, part: int, order: int) -> None:
        if not self._mover.submit(Priority.DEMAND, (part, order), lambda: self._run(fetch, part, order)):
            fetch.cancel()  # the store is closing: ``abort`` settles it

    def _run(self, fetch: Fetch, part: int, order: int) -> None:
        first, last = fetch.parts[part]
        try:
            if not fetch.failed:
                self._read(fetch, part)
                fetch.arrive(first, last)
        except TierError as error:
            self._fail(fetch, error)
        except BaseException:  # a bug; whoever waits must not wait for ever
            fetch.fail()
            raise
        finally:
            if part == 0:
                for following in range(1, len(fetch.parts)):
                    self._submit(fetch, following, order)
            if fetch.part_over():
                self._settle(fetch)

    def _fail(self, fetch: Fetch, error: TierError) -> None:
        """A part could not be read or is not what was written: waiters learn it at once."""
        if fetch.fail():
            kind = "corrupt_blocks" if isinstance(error, Corrupt) else "failed_reads"
            self._residency.counters.add(kind)
            log.warning("a block on disk is dropped: %s", error)

    def abort(self) -> None:
        """The mover is closed and its jobs are gone: fetches that have not settled fail now."""
        with self._residency.lock:
            left = list(self._fetches.values())
        for fetch in left:
            fetch.cancel()
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
            self._check_header(fetch)
        assert fetch.header is not None
        payload = fetch.view[fetch.header_bytes :]
        bad = next(bad_pieces(fetch.header, payload, first, last), None)
        if bad is not None:
            raise Corrupt(f"checksum of layer {bad[0]} differs")

    def _check_header(self, fetch: Fetch) -> None:
        header = decode_header(fetch.view[: fetch.header_bytes])
        residency = self._residency
        with residency.lock:
            index, number = residency.index, fetch.number
            kind = index.kind_of(number)
            expected = (index.key[number], kind.namespace, kind.layout, fetch.resident.stride, index.count[number])
            fetch.header = header
            kept = all(header.tokens.startswith(piece) for piece in fetch.promised)
        if not kept or (header.key, header.namespace, header.layout, header.stride, header.token_count) != expected:
            raise Corrupt("the slot holds another block than the index says")

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
            else:
                residency.host_policy.remove(number)
                residency.keep_until_unleased(number, resident)
                if still_there and not fetch.cancelled:
                    residency.drop_disk(number)
            residency.unhold([number])
            residency.changed.notify_all()


class Load:
    """A load under way. Methods may be called from one thread at a time; none of them raises for what tiers do."""

    def __init__(self, match: Match, sources: list[tuple[Resident | Fetch, int]], views: list[memoryview]) -> None:
        self.layout = match.layout
        self.tokens = sum(tokens for _, tokens in sources)
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

    def tokens_by_tier(self, tokens: int) -> dict[str, int]:
        """Where the first ``tokens`` of the load come from: memory, or the disk."""
        tiers = {"host": 0, "disk": 0}
        for source, used in self._sources:
            used = min(used, tokens)
            tiers["disk" if isinstance(source, Fetch) else "host"] += used
            tokens -= used
        return tiers

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
        self._sources, self._views = [], []
        self.lease.release()
