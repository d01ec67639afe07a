"""Takes in what fetches bring: reads their parts, checks every piece, and makes them blocks in memory, or misses."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from kvstore.block import Header, bad_pieces, decode_header
from kvstore.errors import Corrupt, TierError
from kvstore.fetch import Fetch
from kvstore.heading import base_of
from kvstore.kinds import Origin
from kvstore.mover import Mover
from kvstore.remote.tier import RemoteTier
from kvstore.residency import Residency, Resident
from kvstore.tiers.base import Missing, Wanted
from kvstore.vault import NoKey, Vault

log = logging.getLogger("kvstore")


class Intake:
    """One per store."""

    def __init__(self, residency: Residency, mover: Mover, remote: RemoteTier | None) -> None:
        self._residency, self._mover, self._remote = residency, mover, remote
        self.fetches: dict[int, Fetch] = {}  # that have not settled, by block, oldest first; guarded by residency.lock
        self.ahead: dict[int, Resident] = {}  # blocks that were prefetched, or are, and no load has used; likewise

    def submit(self, fetch: Fetch, part: int) -> None:
        """Asks for a part of a fetch. Not locked."""
        priority, turn = fetch.turn(part)
        if fetch.block is None:
            asked = self._mover.submit(priority, turn, lambda: self._run(fetch, part))
        else:
            assert self._remote is not None
            asked = self._remote.courier.submit(priority, turn, Ordered(self, fetch, part))
        if not asked:
            fetch.cancel()  # the store is closing: ``abort`` settles it

    def _run(self, fetch: Fetch, part: int) -> None:
        if fetch.begin(part):
            self.take(fetch, part, partial(self._read, fetch, part), time.perf_counter())

    def take(self, fetch: Fetch, part: int, bring: Callable[[], None], begin: float) -> bool:
        """One part that was begun: ``bring`` puts it into the slot, or raises. False: it is not what was written."""
        first, last = fetch.parts[part]
        sound = True
        try:
            if not fetch.failed:
                bring()
                self._check(fetch, first, last)
                fetch.took(part, begin, time.perf_counter())
                fetch.arrive(first, last)
        except TierError as error:
            sound = not isinstance(error, Corrupt)
            self._fail(fetch, error)
        except BaseException:  # a bug; whoever waits must not wait for ever
            fetch.fail()
            raise
        finally:
            if part == 0:
                for following in fetch.spread():
                    self.submit(fetch, following)
            if fetch.part_over():
                self.settle(fetch)
        return sound

    def _fail(self, fetch: Fetch, error: TierError) -> None:
        """A part could not be read or is not what was written: waiters learn it at once."""
        if not fetch.fail():
            return
        kind = "corrupt_blocks" if isinstance(error, Corrupt) else "failed_reads"
        if isinstance(error, NoKey):
            kind = "sealed_blocks"
        if fetch.block is None:
            self._residency.counters.add(kind)
            log.warning("a block on disk is dropped: %s", error)
        elif isinstance(error, Corrupt):
            self._residency.counters.add("remote_corrupt_blocks")
            log.warning("a block from the remote tier is dropped: %s", error)
        else:
            missing = isinstance(error, Missing)
            self._residency.counters.add("remote_missing_blocks" if missing else "remote_failed_blocks")

    def _read(self, fetch: Fetch, part: int) -> None:
        """Reads one part (the first with the header) from disk into the slot, and opens it if it is sealed."""
        tier = self._residency.disk
        assert tier is not None
        first, last = fetch.parts[part]
        begin = 0 if part == 0 else fetch.header_bytes + fetch.offsets[first]
        end = fetch.header_bytes + fetch.offsets[last]
        with self._mover.rates.moving("read", end - begin):
            tier.read(fetch.address, begin, fetch.view[begin:end])
            if part == 0:
                self._check_header(fetch, tier.vault)
            if fetch.opened is not None:
                fetch.opened.layers(fetch.view[fetch.header_bytes :], first, last)
        self._residency.counters.add("disk_read_bytes", end - begin)

    def _check_header(self, fetch: Fetch, vault: Vault | None) -> None:
        header = decode_header(fetch.view[: fetch.header_bytes], sealed=True)
        if header.seal is not None:
            if vault is None:
                raise NoKey("a sealed block, and no key folder was given")
            fetch.opened = vault.open(header)
            header = fetch.opened.header
        residency = self._residency
        with residency.lock:
            index, number = residency.index, fetch.number
            kind = index.kind_of(number)
            expected = (index.key[number], kind.namespace, kind.layout, fetch.resident.stride, index.count[number])
            keys = kind.origin.form, base_of(index, number)
            fetch.header = header
            kept = all(header.tokens.startswith(piece) for piece in fetch.promised)
        if not kept or (header.key, header.namespace, header.layout, header.stride, header.token_count) != expected:
            raise Corrupt("the slot holds another block than the index says")
        if (header.form, header.base) != keys:
            raise Corrupt("the slot holds keys of another form, or for other positions, than the index says")

    def _check(self, fetch: Fetch, first: int, last: int) -> None:
        """Every piece of layers ``first`` to ``last - 1``."""
        assert fetch.header is not None
        payload = fetch.view[fetch.header_bytes :]
        bad = next(bad_pieces(fetch.header, payload, first, last), None)
        if bad is not None:
            raise Corrupt(f"checksum of layer {bad[0]} differs")

    def abort(self) -> None:
        """The movers are closed and their jobs are gone: fetches that have not settled fail now."""
        with self._residency.lock:
            left = list(self.fetches.values())
        for fetch in left:
            fetch.cancel()
            self.settle(fetch)

    def settle(self, fetch: Fetch) -> None:
        """No part runs any more. The block is resident, or a miss from now on.

        A reader may still copy layers that came in well from the slot of a fetch that failed later, so that slot goes
        back with the last lease on the block, not before.
        """
        residency, number, resident = self._residency, fetch.number, fetch.resident
        with residency.lock:
            del self.fetches[number]
            there = fetch.there(residency.index)
            if there and not fetch.failed and fetch.header is not None:
                self._arrived(fetch, fetch.header)
            else:
                self.ahead.pop(number, None)
                residency.host_policy.remove(number)
                residency.keep_until_unleased(number, resident)
                if there and not fetch.cancelled:
                    self._lost(fetch)
            if fetch.block is not None:
                fetch.block.taken = False
            residency.unhold([number])
            residency.changed.notify_all()

    def _arrived(self, fetch: Fetch, header: Header) -> None:
        """The block is in memory. Locked."""
        residency, number, resident = self._residency, fetch.number, fetch.resident
        index, kind = residency.index, residency.index.kind_of(number)
        if not kind.fingerprint:
            origin = Origin(header.form, header.writer)
            index.kind[number] = index.intern(replace(kind, fingerprint=header.fingerprint, origin=origin))
        resident.checksums = header.checksums
        residency.put_host(number, resident, header.tokens)
        if fetch.prefetched:
            residency.counters.add("prefetched_blocks")
            residency.counters.add("prefetched_bytes", resident.payload)
        if fetch.block is not None:
            residency.counters.add("remote_read_blocks")
            residency.counters.add("remote_read_bytes", resident.payload)
            if header.expires:
                residency.expire_at(number, header.expires)
            for listener in residency.listeners:
                listener.append(number)
            residency.admit([number])
            residency.share([number])

    def _lost(self, fetch: Fetch) -> None:
        """The block is not where it was found. Locked."""
        if fetch.block is None:
            self._residency.drop_disk(fetch.number)
        else:
            assert self._remote is not None
            self._residency.drop_remote(fetch.number)
            self._remote.seeker.lost(fetch.block.header.key)


class Ordered:
    """A part of a fetch that the remote tier is to bring: ``courier.Order``."""

    def __init__(self, intake: Intake, fetch: Fetch, part: int) -> None:
        assert fetch.block is not None
        self._intake, self._fetch, self._part = intake, fetch, part
        group, key, base = fetch.block.groups[part], fetch.block.header.key, fetch.header_bytes
        self.wanted = [
            Wanted(key, group.part + at, fetch.view[base + begin : base + end])
            for at, (begin, end) in enumerate(group.ranges)
        ]
        self.size = group.ranges[-1][1] - group.ranges[0][0]

    def begin(self) -> bool:
        """See ``Order``."""
        if not self._fetch.begin(self._part):
            return False
        if self._fetch.failed:
            self.over(None, time.perf_counter())
            return False
        return True

    def over(self, error: TierError | None, begin: float) -> bool:
        """See ``Order``."""

        def bring() -> None:
            if error is not None:
                raise error

        return self._intake.take(self._fetch, self._part, bring, begin)
