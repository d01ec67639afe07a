"""Which blocks are on the device. The store's lock guards every call but ``report``.

The device holds copies only: a block is here while memory or disk holds it too, so presence is the index's business
alone. A slot has *users*, the loads that read or fill it; a slot with users is neither evicted nor given back. Streams
may go on reading a slot when its last user is gone: that is what the tier's events are for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvstore.eviction import victims
from kvstore.families import NONE
from kvstore.layout import Layout
from kvstore.lease import Lease
from kvstore.policies.look_ahead import LookAhead
from kvstore.policy import Arrival, EvictionPolicy
from kvstore.tiers.base import DeviceSlots

if TYPE_CHECKING:
    from kvstore.tensors.streams import Event


@dataclass(slots=True, eq=False)
class Slot:
    """One block's payload on the device, or the room for it. Changed by ``Hot`` only."""

    number: int
    address: int  # in the tier
    pointer: int  # where the payload begins in the device's memory
    memory: Any  # the slot's bytes as the tier gives them (a uint8 tensor); they do not go away while this is held
    layout: Layout
    stride: int
    filled: bool = False
    users: int = 1
    gone: bool = False  # its block left the store
    erase: bool = False  # and is to be destroyed

    def keys(self, layer: int) -> int:
        """Where a layer's keys are in the device's memory; its values follow."""
        return self.pointer + self.layout.layer_offsets(self.stride)[layer]


@dataclass(slots=True, eq=False, weakref_slot=True)
class Hold:
    """What a load holds until it ends: its slots, which streams may reuse in their order, and until ``events`` are
    reached the lease on its blocks and what else is ``kept``: who writes memory next, a disk read or a save, knows no
    streams."""

    lease: Lease
    slots: list[Slot]
    events: list[Event] = field(default_factory=list)
    kept: list[object] = field(default_factory=list)


class Hot:
    """Owner of the device tier's slots: by block, in order of use, with users. One per store."""

    def __init__(self, tier: DeviceSlots, policy: EvictionPolicy) -> None:
        self.tier = tier
        self.evicted_blocks = 0
        self.stays: Callable[[int], bool] = lambda _: False  # set by the residency: a block that is pinned here
        self._policy = LookAhead(policy)
        self._slots: dict[int, Slot] = {}  # by block, filled or being filled
        self._leaving: set[Slot] = set()  # of blocks that left the store, with users
        self._erasable: list[Slot] = []
        self._reported: deque[tuple[Sequence[Slot], Sequence[Event]]] = deque()

    def __contains__(self, number: int) -> bool:
        """Whether a load would find the block here."""
        slot = self._slots.get(number)
        return slot is not None and slot.filled

    def __iter__(self) -> Iterator[int]:
        """The blocks that a load would find."""
        return (number for number, slot in self._slots.items() if slot.filled)

    def account(self, payload: Callable[[int], int]) -> dict[str, int]:
        """The tier's part of ``Store.stats``; ``payload`` gives a block's bytes."""
        sizes = [payload(number) for number in self]
        return {"bytes": sum(sizes), "blocks": len(sizes), "capacity": self.tier.capacity, "used": self.tier.used}

    def find(self, number: int) -> Slot | None:
        """The block's slot, which has one user more, until ``done``; None when it is not here (yet)."""
        slot = self._slots.get(number)
        if slot is None or not slot.filled:
            return None
        slot.users += 1
        return slot

    def place(self, number: int, layout: Layout, stride: int) -> Slot | None:
        """A slot to fill, whose one user is the caller; evicts what was used longest ago. None: there is no room."""
        tier = self.tier
        size = layout.class_bytes(stride) - layout.header_bytes  # a slot holds no header
        address = tier.reserve(size)
        if address is None and size <= tier.capacity:
            for group in victims(size, tier, self._policy, self._evictable, self._slots):
                for victim in group:
                    self._let_go(self._slots[victim])
                self.evicted_blocks += len(group)
                address = tier.reserve(size)
                if address is not None:
                    break
        if address is None:
            return None
        slot = Slot(number, address, tier.pointer(address), tier.memory(address), layout, stride)
        self._slots[number] = slot
        self._policy.insert(number, Arrival(size, stride, number, NONE))
        return slot

    def placed(self, number: int) -> bool:
        """Whether the block has a slot, filled or not; then it gets no second one."""
        return number in self._slots

    def schedule(self, chains: Sequence[Sequence[int]]) -> None:
        """What waiting jobs will read, the nearest first: it goes last, whether it is here yet or not."""
        self._policy.schedule(chains)

    def protect(self, window: int) -> None:
        """Of these, the first so many make no room for others from now on."""
        self._policy.protect(window)

    def touch(self, chain: Sequence[int]) -> None:
        """The blocks of a chain, root first, were used."""
        self._policy.touch(chain)

    def arrange(self, chain: Sequence[int]) -> None:
        """The blocks of a chain, root first, as a load leaves it."""
        self._policy.arrange(chain)

    def report(self, slots: Sequence[Slot], events: Sequence[Event]) -> None:
        """``filled``, by whom a finalizer may call: it needs no lock, and counts from the store's next call on."""
        self._reported.append((slots, events))

    def settle(self) -> None:
        """Takes in what was reported."""
        while self._reported:
            self.filled(*self._reported.popleft())

    def filled(self, slots: Iterable[Slot], events: Sequence[Event] = ()) -> None:
        """Their users have put the blocks into them, or streams have, behind ``events``: ``find`` gives them."""
        for slot in slots:
            self.tier.note(slot.address, *events)
            slot.filled = not slot.gone

    def done(self, slots: Iterable[Slot], events: Sequence[Event] = ()) -> bool:
        """One user less for each, whose streams are done with it behind ``events``; slots that nobody filled go back.

        True: something is to be erased.
        """
        before = len(self._erasable)
        for slot in slots:
            self.tier.note(slot.address, *events)
            slot.users -= 1
            assert slot.users >= 0
            if slot.users:
                continue
            if slot.gone:
                self._leaving.remove(slot)
                self._give_back(slot)
            elif not slot.filled:
                self._let_go(slot)
        return len(self._erasable) > before

    def drop(self, number: int, erase: bool) -> None:
        """The block left the store: no load finds it any more; its slot goes back with its last user."""
        slot = self._slots.get(number)
        if slot is None:
            self._policy.remove(number)  # a job may need it here; the number may soon stand for another block
            return
        slot.erase = erase
        if not slot.users:
            self._let_go(slot)
            return
        self._forget(slot)
        slot.gone, slot.filled = True, False
        self._leaving.add(slot)

    def erase_leaving(self) -> None:
        """Has all that only users keep here erased when it goes."""
        for slot in self._leaving:
            slot.erase = True

    def take_erasable(self) -> list[Slot]:
        """Slots whose bytes are to be destroyed; the caller gives their addresses back to the tier afterwards."""
        taken, self._erasable = self._erasable, []
        return taken

    def not_erased(self, slots: Sequence[Slot]) -> None:
        """The device would not destroy what ``take_erasable`` gave; the next try takes it again."""
        self._erasable += slots

    def _evictable(self, number: int) -> int:
        """The slot of a block that may go, or NONE."""
        slot = self._slots[number]
        return NONE if slot.users or self.stays(number) else slot.address

    def demote(self, number: int) -> int:
        """The block goes now, or before all others when its last user is gone; bytes that are free now."""
        slot = self._slots.get(number)
        if slot is None:
            return 0
        if slot.users:
            self._policy.let_go([number])
            return 0
        self._let_go(slot)
        return slot.layout.class_bytes(slot.stride) - slot.layout.header_bytes

    def _let_go(self, slot: Slot) -> None:
        self._forget(slot)
        self._give_back(slot)

    def _forget(self, slot: Slot) -> None:
        del self._slots[slot.number]
        self._policy.remove(slot.number)

    def _give_back(self, slot: Slot) -> None:
        if slot.erase:
            self._erasable.append(slot)
        else:
            self.tier.free(slot.address)
