"""Policies that rank blocks: each against a naive twin, and what it is for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import pytest
from policy_contract import Contract, Driver, Make, arrival, bring, evict

from kvstore.policies.base import Unlearning
from kvstore.policies.fifo import FIFO
from kvstore.policies.gdsf import GDSF, SLOPE
from kvstore.policies.leaves import NONE
from kvstore.policies.lfu_da import LFUDA
from kvstore.policies.lru import LRU
from kvstore.policies.lru2 import LRU2
from kvstore.policy import Arrival


class Naive(Unlearning):
    """By definition: again and again the lowest of all blocks that have no children left, looked for among all."""

    def __init__(self) -> None:
        self.now = 0
        self.arrivals: dict[int, Arrival] = {}
        self.times: dict[int, list[int]] = {}  # when it came, its uses and arrangements
        self.uses: dict[int, int] = {}
        self.offered: set[int] = set()

    def rank(self, block: int) -> tuple[float, ...]:
        raise NotImplementedError

    def used(self, block: int) -> None: ...

    def evicted(self, block: int) -> None: ...

    def insert(self, block: int, arrival: Arrival) -> None:
        if block in self.arrivals:
            self.arrivals[block] = arrival._replace(name=self.arrivals[block].name, parent=self.arrivals[block].parent)
            return
        self.arrivals[block], self.times[block], self.uses[block] = arrival, [], 1
        self.now += 1
        self.used(block)
        self.times[block].append(self.now)

    def touch(self, chain: Sequence[int]) -> None:
        for block in reversed(chain):
            if block in self.arrivals:
                self.uses[block] += 1
                self.now += 1
                self.used(block)
                self.times[block].append(self.now)

    def arrange(self, chain: Sequence[int], served: bool = False) -> None:
        for block in reversed(chain):
            if block in self.arrivals:
                self.now += 1
                self.times[block].append(self.now)

    def remove(self, block: int) -> None:
        if block in self.arrivals:
            if block in self.offered:
                self.evicted(block)
            del self.arrivals[block]

    def victims(self) -> Iterator[int]:
        self.offered = set()
        left = set(self.arrivals)
        while left:
            leaves = left - {self.arrivals[block].parent for block in left}
            block = min(leaves, key=self.rank)
            self.offered.add(block)
            yield block
            left.remove(block)

    def __len__(self) -> int:
        return len(self.arrivals)


class NaiveFIFO(Naive):
    def rank(self, block: int) -> tuple[float, ...]:
        return (self.times[block][0],)


class NaiveLRU2(Naive):
    def __init__(self) -> None:
        super().__init__()
        self.last: dict[int, int] = {}
        self.before: dict[int, int] = {}
        self.history: dict[object, int] = {}

    def rank(self, block: int) -> tuple[float, ...]:
        return self.before[block], self.times[block][-1]

    def used(self, block: int) -> None:
        came = not self.times[block]
        self.before[block] = self.history.pop(self.arrivals[block].name, 0) if came else self.last[block]
        self.last[block] = self.now

    def evicted(self, block: int) -> None:
        self.history[self.arrivals[block].name] = self.last[block]


class NaiveLFUDA(Naive):
    def __init__(self) -> None:
        super().__init__()
        self.age = 0.0
        self.worth: dict[int, float] = {}

    def rank(self, block: int) -> tuple[float, ...]:
        return self.worth[block], self.times[block][-1]

    def used(self, block: int) -> None:
        self.worth[block] = self.age + self.uses[block]

    def evicted(self, block: int) -> None:
        self.age = max(self.age, self.worth[block])


class NaiveGDSF(NaiveLFUDA):
    """Where a block stands is told by its name: the driver's names hang together as its chains do."""

    def __init__(self) -> None:
        super().__init__()
        self.depth: dict[int, int] = {}

    def touch(self, chain: Sequence[int]) -> None:
        known = [block for block in chain if block in self.arrivals]
        for place, block in enumerate(known):
            shallowest = self.depth[known[place - 1]] + self.arrivals[known[place - 1]].tokens if place else 0
            self.depth[block] = max(self.depth[block], shallowest)
        super().touch(chain)

    def used(self, block: int) -> None:
        size, tokens, _, parent = self.arrivals[block]
        if not self.times[block]:
            self.depth[block] = self.depth[parent] + self.arrivals[parent].tokens if parent in self.arrivals else 0
        cost = tokens * (1 + SLOPE * self.depth[block])
        self.worth[block] = self.age + self.uses[block] * cost / size


TWINS: list[tuple[Make, Make]] = [(FIFO, NaiveFIFO), (LRU2, NaiveLRU2), (LFUDA, NaiveLFUDA), (GDSF, NaiveGDSF)]


@pytest.mark.parametrize(("clever", "naive"), TWINS, ids=lambda make: make.__name__)
def test_it_is_what_the_naive_one_is(clever: Make, naive: Make, seed: int) -> None:
    for number in range(3):
        one, other = Driver(clever(), seed + number), Driver(naive(), seed + number)
        for _ in range(300):
            one.step()
            other.step()
            assert list(one.policy.victims()) == list(other.policy.victims())


class TestNaive(Contract):
    @pytest.fixture(params=[naive for _, naive in TWINS], ids=lambda make: make.__name__)
    def make(self, request: pytest.FixtureRequest) -> Make:
        made: Make = request.param
        return made


def test_fifo_does_not_see_use() -> None:
    policy = FIFO()
    bring(policy, [0])
    bring(policy, [1])
    policy.touch([0])
    assert list(policy.victims()) == [0, 1]


def test_lru2_keeps_what_was_used_twice() -> None:
    """Though what was used once is younger; LRU keeps that."""
    left = {}
    for policy in (LRU2(), LRU()):
        for block in range(4):
            bring(policy, [block])
        for block in (0, 2):
            policy.touch([block])
        for block in range(4, 8):
            bring(policy, [block])
        left[type(policy)] = evict(policy, 4)
    assert left == {LRU2: [1, 3, 4, 5], LRU: [1, 3, 0, 2]}


@pytest.mark.parametrize(("ghosts", "first"), [(1 << 20, 3), (2, 3), (1, 0), (0, 0)])
def test_lru2_remembers_what_was_evicted(ghosts: int, first: int) -> None:
    """Block 0 comes back: that was its second use, unless it was forgotten since."""
    policy = LRU2(ghosts)
    bring(policy, [0])
    bring(policy, [1])
    bring(policy, [3])
    assert evict(policy, 2) == [0, 1]
    bring(policy, [0])
    bring(policy, [4])
    policy.remove(3)
    bring(policy, [3])
    policy.touch([4])
    assert next(policy.victims()) == first


def test_lru2_remembers_nothing_of_what_was_forgotten() -> None:
    policy = LRU2()
    bring(policy, [0])
    bring(policy, [1])
    bring(policy, [2])
    assert list(islice(policy.victims(), 2)) == [0, 1]
    assert evict(policy) == [0]
    policy.remove(1)
    bring(policy, [1])
    bring(policy, [0])
    assert list(policy.victims()) == [2, 1, 0]


def test_lfu_da_lets_go_of_what_was_popular_once() -> None:
    """A block that was used 5 times goes after a while of others that are used once; not at once."""
    policy = LFUDA()
    bring(policy, [0])
    for _ in range(4):
        policy.touch([0])
    bring(policy, [1])
    gone = list[int]()
    for block in range(2, 20):
        bring(policy, [block])
        gone += evict(policy)
    assert gone[:9] == [1, 2, 3, 4, 5, 6, 7, 8, 0]


def test_gdsf_keeps_what_costs_most_to_compute_again() -> None:
    """Of equal use, that is the deepest block of the longest chain. With no slope all are equal: the oldest goes."""
    order = {}
    for slope in (SLOPE, 0):
        policy = GDSF(slope)
        bring(policy, [0, 1, 2, 3])
        bring(policy, [4, 5])
        bring(policy, [6])
        order[slope] = evict(policy, 6)
    assert order == {SLOPE: [6, 5, 4, 3, 2, 1], 0: [3, 2, 1, 0, 5, 4]}


def test_gdsf_counts_cost_by_byte_and_use() -> None:
    policy = GDSF()
    for block, (size, tokens) in enumerate([(100, 10), (200, 10), (100, 20), (400, 20)]):
        policy.insert(block, Arrival(size, tokens, block, NONE))
    assert list(policy.victims()) == [1, 3, 0, 2]
    for _ in range(4):
        policy.touch([1])
    assert list(policy.victims()) == [3, 0, 2, 1]
    policy.insert(3, Arrival(50, 20, 3, NONE))
    policy.touch([3])
    assert list(policy.victims()) == [0, 2, 1, 3]


def test_gdsf_sees_how_deep_a_block_is_when_its_chain_is_used() -> None:
    """Not before, when it came before its parent."""
    policy = GDSF()
    for block in (2, 1, 0):
        policy.insert(block, arrival(block, block - 1))
    policy.insert(3, arrival(3))
    assert next(policy.victims()) == 2
    policy.touch([0, 1, 2])
    policy.touch([3])
    assert next(policy.victims()) == 3


def test_gdsf_takes_nothing_from_a_parent_that_is_gone() -> None:
    policy = GDSF()
    bring(policy, [0, 1, 2])
    policy.remove(2)
    policy.remove(1)
    policy.insert(2, arrival(2, 1))
    bring(policy, [3, 4])
    assert list(policy.victims()) == [0, 2, 4, 3]
