"""The contract of ``policy.EvictionPolicy``; every policy's tests inherit it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

import pytest

from kvstore.policies.lru import LRU
from kvstore.policy import EvictionPolicy


class NaiveLRU:
    """What ``LRU`` means, without any cleverness: the time of each block's last use, sorted when asked."""

    def __init__(self) -> None:
        self._used: dict[int, int] = {}
        self._clock = 0

    def _use(self, block: int) -> None:
        self._clock += 1
        self._used[block] = self._clock

    def insert(self, block: int, size: int) -> None:
        if block not in self._used:
            self._use(block)

    def touch(self, chain: Sequence[int]) -> None:
        for block in reversed(chain):
            if block in self._used:
                self._use(block)

    def remove(self, block: int) -> None:
        self._used.pop(block, None)

    def victims(self) -> Iterator[int]:
        return iter(sorted(self._used, key=self._used.__getitem__))

    def __len__(self) -> int:
        return len(self._used)


class RootFirst(LRU):
    """A planted fault: touches a chain from its root on, so that the parent is the oldest."""

    def touch(self, chain: Sequence[int]) -> None:
        super().touch(list(reversed(chain)))


class Forgetful(LRU):
    """A planted fault: a removed block comes back when its chain is touched."""

    def touch(self, chain: Sequence[int]) -> None:
        for block in reversed(chain):
            self.insert(block, 1)
        super().touch(chain)


class Driver:
    """Random chains over a growing forest, as a store would touch them."""

    def __init__(self, policy: EvictionPolicy, seed: int) -> None:
        self.policy = policy
        self.draw = random.Random(seed)
        self.parent: dict[int, int | None] = {}
        self.known: set[int] = set()

    def chain(self, block: int | None) -> list[int]:
        chain: list[int] = []
        while block is not None:
            chain.append(block)
            block = self.parent[block]
        return chain[::-1]

    def step(self) -> None:
        blocks = list(self.parent)
        what = self.draw.random()
        if what < 0.4 or not blocks:
            block = len(self.parent)
            self.parent[block] = self.draw.choice([None, *blocks[-8:]]) if blocks else None
            self.policy.insert(block, self.draw.randrange(1, 100))
            self.known.add(block)
            self.policy.touch(self.chain(block))
        elif what < 0.7:
            self.policy.touch(self.chain(self.draw.choice(blocks)))
        elif what < 0.8:
            block = self.draw.choice(blocks)
            self.policy.insert(block, 7)  # known: resized; else back in a tier
            self.known.add(block)
            self.policy.touch(self.chain(block))
        elif what < 0.9:
            for block in list(self.take(self.draw.randrange(3))):
                self.policy.remove(block)
                self.known.discard(block)
        else:
            block = self.draw.choice([*blocks, 10**9])
            self.policy.remove(block)
            self.known.discard(block)

    def take(self, count: int) -> Iterator[int]:
        for block, _ in zip(self.policy.victims(), range(count), strict=False):
            yield block

    def faults(self) -> list[str]:
        order = list(self.policy.victims())
        found = []
        if len(order) != len(set(order)) or set(order) != self.known:
            found.append("the blocks are not those that came and stayed")
        if len(self.policy) != len(self.known):
            found.append("its length is not the number of blocks")
        place = {block: at for at, block in enumerate(order)}
        for block in order:
            for above in self.chain(block)[:-1]:
                if above in place and place[above] < place[block]:
                    found.append(f"{above} comes before its descendant {block}")
        return found


def faults(policy: EvictionPolicy, seed: int, steps: int = 400) -> list[str]:
    """The first promises of the contract that a policy breaks under random use."""
    driver = Driver(policy, seed)
    for _ in range(steps):
        driver.step()
        if found := driver.faults():
            return found
    return []


class Contract:
    """What each policy promises. Subclasses say how to make one."""

    make: Callable[[], EvictionPolicy]

    def test_children_come_before_parents(self, seed: int) -> None:
        for number in range(10):
            assert faults(type(self).make(), seed + number) == []

    def test_it_begins_empty(self) -> None:
        policy = type(self).make()
        assert len(policy) == 0 and list(policy.victims()) == []

    def test_unknown_blocks_are_no_error(self) -> None:
        policy = type(self).make()
        policy.touch([1, 2, 3])
        policy.remove(7)
        assert len(policy) == 0

    def test_the_caller_may_stop_anywhere(self) -> None:
        policy = type(self).make()
        for block in range(100):
            policy.insert(block, 1)
            policy.touch([block])
        for left in range(100, 0, -1):
            assert len(policy) == left
            policy.remove(next(iter(policy.victims())))
        assert len(policy) == 0


class TestLRU(Contract):
    make = LRU

    def test_it_is_what_the_naive_one_is(self, seed: int) -> None:
        clever, naive = Driver(LRU(), seed), Driver(NaiveLRU(), seed)
        for _ in range(1000):
            clever.step()
            naive.step()
            assert list(clever.policy.victims()) == list(naive.policy.victims())


class TestNaiveLRU(Contract):
    make = NaiveLRU


@pytest.mark.parametrize("planted", [RootFirst, Forgetful])
def test_a_planted_fault_is_found(planted: Callable[[], EvictionPolicy], seed: int) -> None:
    assert faults(planted(), seed) != []
