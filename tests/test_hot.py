"""Which blocks are on the device: the owner of the slots against a dict, over the tier and over its naive twin."""

from __future__ import annotations

from collections.abc import Collection

import hypothesis
import pytest
from devices import MIB, TIERS, tensor
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from kvstore import LayerShape, Layout
from kvstore.hot import Hot, Slot
from kvstore.policies.lru import LRU
from kvstore.tiers.device import DeviceTier

LARGE = Layout((LayerShape(2, 64, 64),) * 4, "float32", block_tokens=64)  # 256 KiB
SMALL = Layout((LayerShape(1, 32, 32),), "float32", block_tokens=64)  # 16 KiB
numbers = st.integers(0, 11)


class HotMachine(RuleBasedStateMachine):
    """``Hot`` over a device tier against a dict; every slot holds who wrote it."""

    device = staticmethod(TIERS["cpu"])

    def __init__(self) -> None:
        super().__init__()
        self.tier = self.device(2 * MIB)
        self.hot = Hot(self.tier, LRU())
        self.model: dict[int, int] = {}  # block -> what its slot holds; a block may be missing there, never be wrong
        self.used: list[tuple[Slot, int, bool]] = []  # slot, what it holds, whether to be filled still
        self.marks = 0

    @rule(number=numbers, large=st.booleans())
    def place(self, number: int, large: bool) -> None:
        if self.hot.placed(number):
            return
        layout = LARGE if large else SMALL
        slot = self.hot.place(number, layout, 64 if number % 2 else 20)
        if slot is None:
            assert any(other.users for other, _, _ in self.used)
            return
        assert len(tensor(slot.memory)) >= layout.payload_bytes(slot.stride)
        self.marks = self.marks % 250 + 1
        tensor(slot.memory).fill_(self.marks)
        self.used.append((slot, self.marks, True))

    @precondition(lambda self: self.used)
    @rule(data=st.data())
    def fill(self, data: st.DataObject) -> None:
        at = data.draw(st.integers(0, len(self.used) - 1))
        slot, mark, fresh = self.used[at]
        if fresh:
            self.hot.filled([slot])
            self.used[at] = (slot, mark, False)
            if not slot.gone:
                self.model[slot.number] = mark

    @rule(number=numbers)
    def find(self, number: int) -> None:
        slot = self.hot.find(number)
        assert (slot is not None) == (number in self.hot)
        if slot is not None:
            assert set(tensor(slot.memory).tolist()) == {self.model[number]}
            self.used.append((slot, self.model[number], False))
        self.hot.touch([number])

    @precondition(lambda self: self.used)
    @rule(data=st.data())
    def done(self, data: st.DataObject) -> None:
        slot, mark, _ = self.used.pop(data.draw(st.integers(0, len(self.used) - 1)))
        assert set(tensor(slot.memory).tolist()) == {mark}
        self.hot.done([slot])

    @rule(number=numbers, erase=st.booleans())
    def drop(self, number: int, erase: bool) -> None:
        self.hot.drop(number, erase)
        self.model.pop(number, None)
        assert number not in self.hot and not self.hot.placed(number)

    @rule(fails=st.booleans())
    def erase(self, fails: bool) -> None:
        slots = self.hot.take_erasable()
        if fails:
            self.hot.not_erased(slots)
            return
        self.tier.erase([slot.address for slot in slots]).wait()
        for slot in slots:
            assert set(tensor(slot.memory).tolist()) == {0}
            self.tier.free(slot.address)

    @invariant()
    def accounts_are_right(self) -> None:
        assert self.tier.used <= self.tier.capacity
        assert set(self.hot) <= self.model.keys()
        if isinstance(self.tier, DeviceTier):
            live = {n << 24 | slot for n, extent in self.tier._slab.extents.items() for slot in extent.live}
            known = [*self.hot._slots.values(), *self.hot._leaving, *self.hot._erasable]
            assert sorted(live) == sorted(slot.address for slot in known)

    def teardown(self) -> None:
        self.tier.close()


def run(machine: type[HotMachine], seed: int, examples: int, phases: Collection[Phase] = tuple(Phase)) -> None:
    profile = settings(
        phases=phases,
        max_examples=examples,
        stateful_step_count=40,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(hypothesis.seed(seed)(machine), settings=profile)


class NaiveMachine(HotMachine):
    device = staticmethod(TIERS["naive"])


@pytest.mark.parametrize("machine", [HotMachine, NaiveMachine])
def test_the_device_is_a_dict(machine: type[HotMachine], seed: int) -> None:
    run(machine, seed, examples=60)


def _evicts_what_is_used(hot: Hot, number: int) -> int:
    return hot._slots[number].address


def _keeps(hot: Hot, number: int, erase: bool) -> None:
    return None


def _gives_what_is_not_filled(hot: Hot, number: int) -> bool:
    return number in hot._slots


PLANTED = {"_evictable": _evicts_what_is_used, "drop": _keeps, "__contains__": _gives_what_is_not_filled}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hot, name, PLANTED[name])
    with pytest.raises((AssertionError, KeyError, BaseExceptionGroup)):
        run(HotMachine, seed, examples=60, phases=[Phase.generate])


def test_what_was_used_longest_ago_goes_and_what_is_in_use_stays() -> None:
    hot = Hot(DeviceTier(MIB, "cpu"), LRU())
    slots = [slot for number in range(4) if (slot := hot.place(number, LARGE, 64)) is not None]
    hot.filled(slots)
    hot.done(slots[1:])
    hot.touch([2])
    assert hot.place(4, LARGE, 64) is not None
    assert (list(hot), hot.evicted_blocks) == ([0, 2, 3], 1)
    assert hot.place(5, LARGE, 64) is not None
    assert hot.place(6, LARGE, 64) is not None
    assert list(hot) == [0]
    assert hot.place(7, LARGE, 64) is None
    hot.tier.close()
