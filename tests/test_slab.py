"""The slab against a naive allocator: the same room, never one slot twice, never over budget."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvstore.tiers.slab import SLOT_BITS, SLOT_MASK, Extent, Slab

CAPACITY, EXTENT, OVERHEAD = 4000, 700, 10
CLASSES = (100, 130, 260, 800)


class Ground:
    """What an owner of a slab does: makes room and gives it back."""

    def __init__(self) -> None:
        self.there: dict[int, Extent] = {}
        self.refuses = False

    def grow(self, extent: Extent) -> bool:
        if self.refuses:
            return False
        assert extent.number not in self.there
        self.there[extent.number] = extent
        return True

    def shrink(self, extent: Extent) -> None:
        del self.there[extent.number]


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.ground = Ground()
        self.slab = self.make()
        self.live: dict[int, int] = {}  # the naive allocator: address -> class
        self.seized: dict[int, list[int]] = {}

    def make(self) -> Slab:
        return Slab(CAPACITY, EXTENT, self.ground.grow, self.ground.shrink, OVERHEAD)

    def bytes_of(self, address: int) -> range:
        extent = self.slab.extents[address >> SLOT_BITS]
        start = (address & SLOT_MASK) * extent.slot_bytes
        return range(start, start + extent.slot_bytes)

    @rule(size=st.sampled_from(CLASSES))
    def allocate(self, size: int) -> None:
        free = sum(
            extent.slots - sum(1 for address in self.live if address >> SLOT_BITS == extent.number)
            for extent in self.slab.extents.values()
            if extent.slot_bytes == size and extent.number not in self.seized
        )
        address = self.slab.allocate(size)
        if address is None:
            assert free == 0
            if not self.ground.refuses:
                empty = [
                    extent
                    for extent in self.slab.extents.values()
                    if extent.slot_bytes != size and not any(a >> SLOT_BITS == extent.number for a in self.live)
                ]
                assert empty == []
                assert self.slab.used + OVERHEAD + size > CAPACITY
            return
        assert address not in self.live
        assert self.slab.slot_bytes(address) == size
        assert self.slab.offset(address) == self.bytes_of(address).start
        self.live[address] = size

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        address = data.draw(st.sampled_from(sorted(self.live)))
        del self.live[address]
        self.slab.free(address)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free_neighbours(self, data: st.DataObject) -> None:
        address = data.draw(st.sampled_from(sorted(self.live)))
        for other in self.slab.neighbours(address):
            del self.live[other]
            self.slab.free(other)
        assert address not in self.live

    @rule(data=st.data())
    def seize(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from([*self.slab.extents, 999]))
        if number not in self.seized:
            self.seized[number] = self.slab.seize(number)

    @rule()
    def restore(self) -> None:
        for number, slots in self.seized.items():
            self.slab.restore(number, slots)
        self.seized.clear()

    @rule(refuses=st.booleans())
    def refuse(self, refuses: bool) -> None:
        self.ground.refuses = refuses

    @rule()
    def reopen(self) -> None:
        self.restore()
        old, self.slab = self.slab, self.make()
        for extent in old.extents.values():
            self.slab.adopt(Extent(extent.number, extent.slot_bytes, extent.slots))
        self.ground.there = dict(self.slab.extents)
        for address in self.live:
            assert self.slab.claim(address)
            assert not self.slab.claim(address)
        assert not self.slab.claim(1 << 60)
        self.slab.settle()

    @invariant()
    def accounts_are_right(self) -> None:
        slab = self.slab
        assert slab.used == sum(self.slab.cost(extent) for extent in slab.extents.values()) <= CAPACITY
        assert slab.extents.keys() == self.ground.there.keys()
        assert {a for e in slab.extents for a in slab.neighbours(e << SLOT_BITS)} == set(self.live)
        for extent in slab.extents.values():
            free = set(extent.free)
            assert len(free) == len(extent.free)
            assert not free & extent.live
            if extent.number not in self.seized:
                assert free | extent.live == set(range(extent.slots))
        for size in CLASSES:
            assert slab.free_slots(size) == sum(len(e.free) for e in slab.extents.values() if e.slot_bytes == size)


Machine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestSlab = Machine.TestCase


class Leaky(Machine):
    """A planted fault: a freed slot stays on the list of live ones now and then."""

    def make(self) -> Slab:
        slab = super().make()
        free = slab.free

        def leaking(address: int) -> None:
            free(address)
            if address & SLOT_MASK == 1:
                slab.extents[address >> SLOT_BITS].free.append(1)

        slab.free = leaking  # type: ignore[method-assign]
        return slab


def test_the_machine_finds_a_slot_that_is_given_twice() -> None:
    Leaky.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None, database=None)
    with pytest.raises(AssertionError):
        Leaky.TestCase("runTest").runTest()


@pytest.fixture
def slab() -> Iterator[Slab]:
    ground = Ground()
    yield Slab(CAPACITY, EXTENT, ground.grow, ground.shrink)


def test_numbers_are_not_used_again(slab: Slab) -> None:
    slab.skip(41)
    address = slab.allocate(100)
    assert address is not None
    assert address >> SLOT_BITS == 42


def test_many_slots_are_taken_in_at_once(slab: Slab) -> None:
    slab.adopt(Extent(3, 100, 7))
    slab.occupy(3, {1, 2, 5})
    slab.settle()
    assert sorted(slab.neighbours(3 << SLOT_BITS)) == [3 << SLOT_BITS | n for n in (1, 2, 5)]
    assert slab.free_slots(100) == 4
    assert not slab.claim(3 << SLOT_BITS | 2)
