"""Where the bytes of blocks are: host slots, disk slots, leases, deletion. How room is made stands in room.py.

``lock`` guards everything here, the index and both policies; it is held for microseconds, never across a copy or I/O.
Comments below say "locked" where the caller must hold it.

What keeps bytes in place: a block with a lease, a block that is being written or fetched (both hold a lease of their
own), and drafts. Everything else may be evicted. Bytes that lose their place in the index while leased are *doomed*:
invisible at once, given back when the last lease ends.
"""

from __future__ import annotations

import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count as counter

from kvstore.doomed import Doomed, DoomedSlots
from kvstore.errors import StoreClosed
from kvstore.expiry import Expiry
from kvstore.families import NONE
from kvstore.hot import Hold, Hot
from kvstore.index import Index
from kvstore.keeping import Keeping
from kvstore.layout import Layout
from kvstore.metrics import Counters
from kvstore.policies.look_ahead import LookAhead
from kvstore.policy import Arrival, EvictionPolicy
from kvstore.remote.block import RemoteBlock
from kvstore.tiers.base import Tier
from kvstore.tiers.host import HostTier
from kvstore.uses import Uses


@dataclass(slots=True, eq=False)
class Resident:
    """A block's slot in the host tier. ``clean``: nothing is lost when it goes (on disk, or never to be)."""

    address: int
    layout: Layout
    stride: int
    payload: int  # bytes of its tokens without padding
    clean: bool = False
    checksums: array[int] | None = None  # of the payload as it lies in the slot, once somebody has taken them
    failed: bool = False  # its disk write failed; counted once, never tried again
    unwanted: bool = False  # not worth a write while the disk is full
    demoted: bool = False  # goes from here as soon as it is on disk


class Residency:
    """Owner of all state that the lives of a load and of a save share."""

    def __init__(
        self,
        host: HostTier,
        disk: Tier | None,
        host_policy: EvictionPolicy,
        disk_policy: EvictionPolicy,
        hot: Hot | None = None,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)  # a write or a fetch has settled
        self.host, self.disk, self.hot = host, disk, hot
        self.host_policy, self.disk_policy = LookAhead(host_policy), LookAhead(disk_policy)
        self.counters = Counters()
        self.index = Index(disk.tokens if disk is not None else lambda _: None)
        self.residents: dict[int, Resident] = {}
        self.host_payload = self.disk_payload = 0
        self.wall, self.sequences, self.uses = wall, counter(1), Uses(self.index, wall)
        self.keeping = Keeping({"host": host, "disk": disk, "device": hot.tier if hot is not None else None})
        if hot is not None:
            hot.stays = partial(self.keeping.stays, "device")
        self.write_soon: Callable[[int], None] = lambda _: None  # set by the writer: a dirty block is to be written
        self.admit: Callable[[Sequence[int]], None] = lambda _: None  # likewise: a chain is saved, or used anew
        self.share: Callable[[Sequence[int]], None] = lambda _: None  # likewise, for the remote tier
        self.listeners: list[deque[int]] = []  # are told the numbers of blocks that are new here
        self.erase_soon: Callable[[], None] = lambda: None  # set by the store: ``take_erasable`` has something
        self.doomed = DoomedSlots(host, disk, lambda: self.erase_soon())
        # Filled by finalizers, which may run anywhere and so take no lock; taken in by ``settle``.
        self._ended_loads = deque[Hold]()
        self._ended_leases, self._abandoned_slots = deque[Sequence[int]](), deque[int]()
        self._expiry, self.drafts, self.closed = Expiry(), 0, False  # closed: no more loads, drafts and saves

    def check_open(self) -> None:
        """Raises ``StoreClosed`` once the store closes: what comes now could neither be kept nor given back. Locked."""
        if self.closed:
            raise StoreClosed("the store is closed; open it again with kvstore.open")

    def expire_at(self, number: int, when: float) -> None:
        """Notes that a block is to go at ``when`` (Unix seconds). Locked."""
        self._expiry.at(number, self.index.sequence[number], when)

    def _expire(self) -> None:
        now = self.wall()
        for number in self._expiry.due(self.index, now):
            self.doom(number, erase=False)
            self.counters.add("expired_blocks")
        if ended := self.keeping.expire(now):
            self.counters.add("expired_pins", ended)

    def abandon_disk(self, address: int, sequence: int) -> None:
        """A written slot that is nobody's block after all: the block was forgotten meanwhile. Locked."""
        if self.disk is not None:
            self.disk.forget([sequence])
        self.doomed.give_back(Doomed(NONE, address, erase=True))

    # -- leases ------------------------------------------------------------------------------------------------

    def hold(self, numbers: Iterable[int]) -> None:
        """Takes one lease on each block. Locked."""
        for number in numbers:
            self.index.leases[number] = self.index.leases.get(number, 0) + 1

    def lease_ended(self, numbers: Sequence[int]) -> None:
        """Called by finalizers: no lock is taken."""
        self._ended_leases.append(numbers)

    def load_ended(self, hold: Hold) -> None:
        """Called by finalizers: no lock is taken."""
        self._ended_loads.append(hold)

    def slot_abandoned(self, address: int) -> None:
        """A draft was dropped; called by finalizers: no lock is taken."""
        self._abandoned_slots.append(address)

    def settle(self) -> None:
        """Takes in what finalizers have handed over. Locked."""
        ended = len(self._ended_loads)  # they have reported what they filled before
        if self.hot is not None:
            self.hot.settle()
        for _ in range(ended):
            hold = self._ended_loads.popleft()
            slots, hold.slots = hold.slots, []
            hold.events = [event for event in hold.events if not event.done()]
            if self.hot is not None and self.hot.done(slots, hold.events):
                self.erase_soon()
            if hold.events:
                self._ended_loads.append(hold)
            else:
                hold.lease.release()
        while self._ended_leases:
            self.unhold(self._ended_leases.popleft())
        while self._abandoned_slots:
            self.host.free(self._abandoned_slots.popleft())
            self.drafts -= 1
        self._expire()

    def unhold(self, numbers: Iterable[int]) -> None:
        """Ends one lease on each block. Locked."""
        leases, index = self.index.leases, self.index
        for number in numbers:
            leases[number] -= 1
            assert leases[number] >= 0
            if leases[number]:
                continue
            del leases[number]
            self.doomed.unleased(number)
            if number in index.remote:
                self.drop_remote(number)
            index.sweep(number)

    # -- presence ----------------------------------------------------------------------------------------------

    def put_host(self, number: int, resident: Resident, tokens: bytes) -> None:
        """A block's bytes are in a host slot from now on. Locked."""
        if not self.index.present(number):
            self.index.link(number, tokens)
        self.index.tokens[number] = tokens
        self.index.remote.pop(number, None)
        self.residents[number] = resident
        self.host_payload += resident.payload
        self.host_policy.insert(number, self.arrival(number))

    def put_disk(self, number: int, address: int, stride: int) -> None:
        """A block's bytes are on disk from now on; the caller arranges its chain. Locked."""
        self.index.disk[number], self.index.stride[number] = address, stride
        self.disk_payload += self.payload(number)
        self.disk_policy.insert(number, self.arrival(number))

    def payload(self, number: int) -> int:
        """Bytes of a block's tokens, without padding. Locked."""
        return self.index.kind_of(number).layout.token_payload * self.index.count[number]

    def arrival(self, number: int) -> Arrival:
        """What policies are told of a block. Locked."""
        index = self.index
        return Arrival(self.payload(number), index.count[number], index.key[number], index.parent[number])

    def drop_host(self, number: int) -> None:
        """Evicts a block's host copy. Locked."""
        self.host.free(self.take_host(number))

    def take_host(self, number: int) -> int:
        """Evicts a block's host copy, whose slot is the caller's now. Locked."""
        resident = self._forget_host(number)
        assert resident is not None
        self.index.sweep(number)
        return resident.address

    def drop_disk(self, number: int) -> None:
        """Evicts a block's disk copy. Locked."""
        address = self._forget_disk(number)
        if address != NONE and self.disk is not None:
            self.disk.forget([self.index.sequence[number]])
            self.disk.free(address)
        self.index.sweep(number)

    def put_remote(self, number: int, block: RemoteBlock) -> None:
        """A block is known to be in the remote tier, and nowhere else; the caller takes a lease. Locked."""
        self.index.remote[number] = block
        self.index.link(number, block.header.tokens)

    def drop_remote(self, number: int) -> None:
        """A block that is in the remote tier only is known no more. Locked."""
        if number in self.index.remote:
            self._leave(number)
            del self.index.remote[number]
            self.index.sweep(number)

    def doom(self, number: int, erase: bool) -> bool:
        """Makes a block invisible now; its bytes go now, or with its last lease (then True). Locked."""
        index = self.index
        if not index.present(number):
            return False
        self._leave(number, erase)
        index.remote.pop(number, None)
        disk = self._forget_disk(number, linked=False)
        if disk != NONE and self.disk is not None:
            self.disk.forget([index.sequence[number]])  # now, so that no restart brings it back
        resident = self._forget_host(number, linked=False)
        doomed = Doomed(NONE if resident is None else resident.address, disk, erase, index.kind[number])
        if leased := number in index.leases:
            self.doomed.hold(number, doomed)
        else:
            self.doomed.give_back(doomed)
        index.sweep(number)
        return leased

    def keep_until_unleased(self, number: int, resident: Resident) -> None:
        """A slot that is nobody's block, but may still be read under leases on ``number`` (at least one). Locked."""
        assert number in self.index.leases
        self.doomed.hold(number, Doomed(resident.address, NONE, erase=False))

    def erase_doomed(self, kinds: set[int]) -> int:
        """Has all that only leases keep alive erased when it goes; returns how much of it is of these kinds. Locked."""
        if self.hot is not None:
            self.hot.erase_leaving()
        return self.doomed.erase(kinds)

    def _leave(self, number: int, erase: bool = False) -> None:
        """Neither memory nor disk has the block any more; so the device may not, either."""
        self.index.unlink(number)
        self.keeping.gone(number)
        for policy in (self.host_policy, self.disk_policy):  # where jobs may still need what this number stood for
            policy.remove(number)
        if self.hot is not None:
            self.hot.drop(number, erase)

    def _forget_host(self, number: int, linked: bool = True) -> Resident | None:
        resident = self.residents.pop(number, None)
        if resident is None:
            return None
        self.host_policy.remove(number)
        self.host_payload -= resident.payload
        if linked and self.index.disk[number] == NONE:
            self._leave(number)
        self.index.tokens.pop(number, None)
        return resident

    def _forget_disk(self, number: int, linked: bool = True) -> int:
        index = self.index
        address = index.disk[number]
        if address == NONE:
            return NONE
        if linked and number not in index.tokens:
            self._leave(number)
        index.disk[number] = NONE
        self.disk_policy.remove(number)
        self.disk_payload -= self.payload(number)
        return address
