"""The contract of ``policy.EvictionPolicy`` for every policy, what shows that it finds faults, and LRU."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import islice

import pytest
from policy_contract import Contract, Driver, Make, arrival, bring, faults

from kvstore.policies.arc import ARC
from kvstore.policies.base import Unlearning
from kvstore.policies.clock import CLOCK
from kvstore.policies.fifo import FIFO
from kvstore.policies.gdsf import GDSF
from kvstore.policies.lfu_da import LFUDA
from kvstore.policies.lru import LRU
from kvstore.policies.lru2 import LRU2
from kvstore.policies.s3_fifo import S3FIFO
from kvstore.policy import Arrival, EvictionPolicy

# Their victims do not change while nothing but looking at them happens.
STEADY: list[Make] = [LRU, FIFO, CLOCK, LRU2, LFUDA, GDSF]
POLICIES: list[Make] = [*STEADY, ARC, S3FIFO]


def named(policy: object) -> str:
    return getattr(policy, "__name__", str(policy))


class TestPolicies(Contract):
    @pytest.fixture(params=POLICIES, ids=named)
    def make(self, request: pytest.FixtureRequest) -> Make:
        made: Make = request.param
        return made


@pytest.mark.parametrize("make", STEADY, ids=named)
def test_victims_that_are_asked_for_again_are_the_same(make: Make, seed: int) -> None:
    for number in range(10):
        draw = random.Random(seed + number)
        looked_at, other = Driver(make(), seed + number), Driver(make(), seed + number)
        for _ in range(60):
            looked_at.step()
            other.step()
            if draw.random() < 0.3:
                seen = list(islice(looked_at.policy.victims(), draw.randrange(10)))
                order = list(other.policy.victims())
                assert order[: len(seen)] == seen
                assert list(looked_at.policy.victims()) == order


@pytest.mark.parametrize("make", POLICIES, ids=named)
def test_a_block_inherits_nothing_from_another_of_its_number(make: Make) -> None:
    policy = make()
    bring(policy, [0])
    for _ in range(3):
        policy.touch([0])
    policy.remove(0)
    policy.insert(0, arrival("another"))
    bring(policy, [1])
    assert list(policy.victims()) == [0, 1]


class NaiveLRU(Unlearning):
    """What ``LRU`` means, without any cleverness: the time of each block's last use, sorted when asked."""

    def __init__(self) -> None:
        self._used: dict[int, int] = {}
        self._clock = 0

    def _use(self, block: int) -> None:
        self._clock += 1
        self._used[block] = self._clock

    def insert(self, block: int, arrival: Arrival) -> None:
        if block not in self._used:
            self._use(block)

    def touch(self, chain: Sequence[int]) -> None:
        for block in reversed(chain):
            if block in self._used:
                self._use(block)

    def arrange(self, chain: Sequence[int], served: bool = False) -> None:
        self.touch(chain)

    def remove(self, block: int) -> None:
        self._used.pop(block, None)

    def victims(self) -> Iterator[int]:
        return iter(sorted(self._used, key=self._used.__getitem__))

    def __len__(self) -> int:
        return len(self._used)


class TestNaiveLRU(Contract):
    @pytest.fixture
    def make(self) -> Make:
        return NaiveLRU


def test_lru_is_what_the_naive_one_is(seed: int) -> None:
    clever, naive = Driver(LRU(), seed), Driver(NaiveLRU(), seed)
    for _ in range(1000):
        clever.step()
        naive.step()
        assert list(clever.policy.victims()) == list(naive.policy.victims())


class RootFirst(LRU):
    """A planted fault: a chain is arranged from its root on, so that the parent is the oldest."""

    def arrange(self, chain: Sequence[int], served: bool = False) -> None:
        super().arrange(list(reversed(chain)), served)


class Forgetful(LRU):
    """A planted fault: a removed block comes back when its chain is touched."""

    def touch(self, chain: Sequence[int]) -> None:
        for block in reversed(chain):
            self._order[block] = None
        super().touch(chain)


class Treeless(FIFO):
    """A planted fault: it does not see what stands behind what."""

    def insert(self, block: int, arrival: Arrival) -> None:
        super().insert(block, arrival._replace(parent=-1))


class Hasty(GDSF):
    """A planted fault: a block that is known comes in a second time, behind another."""

    def insert(self, block: int, arrival: Arrival) -> None:
        self.remove(block)
        super().insert(block, arrival)


class LeavesOnly(LRU2):
    """A planted fault: it ends when it has given every leaf."""

    def victims(self) -> Iterator[int]:
        leaves = [block for block in super().victims() if self._leaves.is_leaf(block)]
        return iter(leaves)


class Dropping(CLOCK):
    """A planted fault: what it gave and nobody removed is lost."""

    def victims(self) -> Iterator[int]:
        for block in list(super().victims()):
            yield block
            self.remove(block)


class Counting(LRU):
    """A planted fault: a block that was removed twice is counted twice."""

    def __init__(self) -> None:
        super().__init__()
        self._removed = 0

    def remove(self, block: int) -> None:
        self._removed += block not in self._order
        super().remove(block)

    def __len__(self) -> int:
        return super().__len__() - self._removed


@pytest.mark.parametrize("planted", [RootFirst, Forgetful, Treeless, Hasty, LeavesOnly, Dropping, Counting])
def test_a_planted_fault_is_found(planted: type[EvictionPolicy], seed: int) -> None:
    assert faults(planted(), seed) != []


def test_bringing_a_chain_is_what_the_store_does() -> None:
    policy = LRU()
    bring(policy, [0, 1])
    bring(policy, [2])
    bring(policy, [0, 1, 3], first=2)
    assert list(policy.victims()) == [2, 3, 1, 0]
