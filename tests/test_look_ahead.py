"""``LookAhead`` against a naive twin: the order of its victims, sorted by what it means."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence

import pytest
from policy_contract import Contract, Make

from kvstore.policies.look_ahead import LookAhead
from kvstore.policies.lru import LRU
from kvstore.policies.windows import FEW_JOBS, Windows
from kvstore.policy import Arrival

NEVER = -1  # the parent of a first block


def arrival(block: int, parent: int) -> Arrival:
    return Arrival(1, 1, block, parent)


class Naive:
    """What ``LookAhead`` means, without any cleverness."""

    def __init__(self) -> None:
        self.inner = LRU()
        self.chains: list[list[int]] = []
        self.window = 0
        self.spent: list[int] = []

    def schedule(self, chains: Sequence[Sequence[int]]) -> None:
        self.chains, self.window = [list(chain) for chain in chains], 0
        self.take_back(block for chain in chains for block in chain)

    def protect(self, window: int) -> None:
        self.window = window

    def let_go(self, blocks: Iterable[int]) -> None:
        self.spent += [block for block in blocks if block not in self.spent]

    def take_back(self, blocks: Iterable[int]) -> None:
        taken = set(blocks)
        self.spent = [block for block in self.spent if block not in taken]

    def insert(self, block: int, arrival: Arrival) -> None:
        if arrival.parent != NEVER and not any(arrival.parent in chain for chain in self.chains):
            self.chains = [[other for other in chain if other != block] for chain in self.chains]
        self.inner.insert(block, arrival)

    def touch(self, chain: Sequence[int]) -> None:
        self.take_back(chain)
        self.inner.touch(chain)

    def arrange(self, chain: Sequence[int]) -> None:
        self.touch(chain)

    def remove(self, block: int) -> None:
        self.take_back([block])
        self.chains = [[other for other in chain if other != block] for chain in self.chains]
        self.inner.remove(block)

    def victims(self) -> Iterator[int]:
        known = list(self.inner.victims())
        first: dict[int, tuple[int, int]] = {}  # job and place in its chain
        for job, chain in enumerate(self.chains):
            for place, block in enumerate(chain):
                first.setdefault(block, (job, place))
        needed = sorted((block for block in known if block in first), key=first.__getitem__, reverse=True)
        yield from (block for block in self.spent if block in known)
        yield from (block for block in known if block not in first and block not in self.spent)
        yield from (block for block in needed if first[block][0] >= self.window)

    def __len__(self) -> int:
        return len(self.inner)


class Furthest(LookAhead):
    """A planted fault: a block's place is that in the furthest job that needs it."""

    def schedule(self, chains: Sequence[Sequence[int]]) -> None:
        super().schedule(chains[::-1])


class Faithful(LookAhead):
    """A planted fault: a number is needed still when it stands for another block."""

    def remove(self, block: int) -> None:
        places = dict(self._places)
        super().remove(block)
        self._places = places


class Driver:
    """The same random life for several: chains over a forest, jobs that read them, blocks that go and come."""

    def __init__(self, policies: Sequence[LookAhead | Naive], seed: int) -> None:
        self.policies = policies
        self.draw = random.Random(seed)
        self.parent: dict[int, int] = {}
        self.known: set[int] = set()

    def chain(self, block: int) -> list[int]:
        chain = []
        while block != NEVER:
            chain.append(block)
            block = self.parent[block]
        return chain[::-1]

    def step(self) -> None:
        draw, what = self.draw, self.draw.random()
        blocks = list(self.parent)
        if what < 0.3 or not blocks:
            block = min(set(range(len(blocks) + 1)) - self.parent.keys())
            self.parent[block] = draw.choice([NEVER, *blocks[-8:]])
            self.come(self.chain(block))
        elif what < 0.45:
            self.come(self.chain(draw.choice(blocks)))
        elif what < 0.6:
            chain = self.chain(draw.choice(blocks))
            for policy in self.policies:
                policy.touch(chain)
        elif what < 0.75:
            chains = [self.chain(draw.choice(blocks)) for _ in range(draw.randrange(6))]
            window = draw.randrange(4)
            for policy in self.policies:
                policy.schedule(chains)
                policy.protect(window)
        elif what < 0.85:
            spent = self.spendable()
            for policy in self.policies:
                policy.let_go(spent)
        else:
            self.go()

    def come(self, chain: list[int]) -> None:
        """A request brings what is missing of its chain."""
        for policy in self.policies:
            for block in chain:
                if block not in self.known or self.draw.random() < 0.1:
                    policy.insert(block, arrival(block, self.parent[block]))
            policy.arrange(chain)
        self.known.update(chain)

    def spendable(self) -> list[int]:
        """Some blocks that no job needs, and behind which none stands."""
        needed = {block for policy in self.policies if isinstance(policy, Naive) for c in policy.chains for block in c}
        above = {other for block in self.known for other in self.chain(block)[:-1]}
        free = [block for block in self.known if block not in needed and block not in above]
        return self.draw.sample(free, min(2, len(free)))

    def go(self) -> None:
        """The first victims go; some of them for good, and their numbers are other blocks' from then on."""
        going = [block for block, _ in zip(self.policies[-1].victims(), range(3), strict=False)]
        for block in going:
            self.known.discard(block)
            for policy in self.policies:
                policy.remove(block)
            if block not in self.parent.values() and self.draw.random() < 0.5:
                del self.parent[block]


def differences(made: Callable[[LRU], LookAhead], seed: int, steps: int = 500) -> list[str]:
    clever, naive = made(LRU()), Naive()
    driver = Driver([clever, naive], seed)
    for number in range(steps):
        driver.step()
        if (found := list(clever.victims())) != (meant := list(naive.victims())):
            return [f"step {number}: {found} but {meant}"]
        if len(clever) != len(naive):
            return [f"step {number}: {len(clever)} blocks but {len(naive)}"]
        place = {block: at for at, block in enumerate(found)}
        for block in found:
            for above in driver.chain(block)[:-1]:
                if place.get(above, len(found)) < place[block]:
                    return [f"step {number}: {above} comes before {block}, which stands behind it"]
    return []


def test_it_is_what_the_naive_one_is(seed: int) -> None:
    for number in range(20):
        assert differences(LookAhead, seed + number) == []


@pytest.mark.parametrize("planted", [Furthest, Faithful])
def test_a_planted_fault_is_found(planted: Callable[[LRU], LookAhead], seed: int) -> None:
    assert any(differences(planted, seed + number) for number in range(60))


class TestUnscheduled(Contract):
    """Without a queue it is the policy inside."""

    @pytest.fixture
    def make(self) -> Make:
        return lambda: LookAhead(LRU())


def filled(blocks: int) -> LookAhead:
    """First blocks, 0 the oldest."""
    policy = LookAhead(LRU())
    for block in range(blocks):
        policy.insert(block, arrival(block, NEVER))
    return policy


def test_the_furthest_job_goes_first_and_its_tail_before_its_root() -> None:
    policy = filled(9)
    policy.schedule([[0, 1, 2], [0, 1, 3, 4], [5, 6, 99]])
    assert list(policy.victims()) == [7, 8, 6, 5, 4, 3, 2, 1, 0]
    policy.protect(1)
    assert list(policy.victims()) == [7, 8, 6, 5, 4, 3]
    policy.protect(7)
    assert list(policy.victims()) == [7, 8]
    policy.schedule([])
    assert list(policy.victims()) == list(range(9))


def test_what_nobody_came_for_goes_before_all_others() -> None:
    policy = filled(6)
    policy.let_go([5, 4])
    assert list(policy.victims()) == [5, 4, 0, 1, 2, 3]
    policy.touch([5])
    assert list(policy.victims()) == [4, 0, 1, 2, 3, 5]
    policy.schedule([[4]])
    assert list(policy.victims()) == [0, 1, 2, 3, 5, 4]


class Counting(LRU):
    """Counts how many victims it was asked for."""

    asked = 0

    def victims(self) -> Iterator[int]:
        for block in super().victims():
            self.asked += 1
            yield block


def test_a_victim_costs_no_more_than_the_blocks_that_are_needed() -> None:
    inner = Counting()
    policy = LookAhead(inner)
    for block in range(10_000):
        policy.insert(block, arrival(block, NEVER))
    assert next(policy.victims()) == 0 and inner.asked == 1
    policy.schedule([list(range(0, 10, 2)), [9_000]])
    assert next(policy.victims()) == 1 and inner.asked == 3


def test_what_a_job_will_read_is_admitted() -> None:
    class Strict(LRU):
        def admits(self, block: int) -> bool:
            return False

    policy = LookAhead(Strict())
    policy.insert(1, arrival(1, NEVER))
    assert not policy.admits(1)
    policy.schedule([[1]])
    assert policy.admits(1)


def test_windows_follow_from_the_mean_of_what_a_job_takes() -> None:
    windows = Windows()
    assert windows.eviction(1) > 1 << 20 and windows.prefetch(0) == windows.eviction(0) == 0  # nothing is known yet
    for size in (10, 20, 30):
        windows.saw(size)
    assert (windows.prefetch(100), windows.prefetch(19), windows.prefetch(0)) == (5, 1, 0)
    assert (windows.eviction(1000), windows.eviction(19)) == (50, 0)
    for _ in range(10 * FEW_JOBS):
        windows.saw(100)
    assert windows.eviction(1000) == 10
