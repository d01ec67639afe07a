"""What every eviction policy must do: a test class inherits ``Contract`` and gives it a ``make``."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import islice

from kvstore.policy import Arrival, EvictionPolicy

Make = Callable[[], EvictionPolicy]
NOWHERE = 10**9  # a number that no block has


class Driver:
    """Random requests on a growing forest, as a store would tell a policy of them, and other things that happen."""

    def __init__(self, policy: EvictionPolicy, seed: int) -> None:
        self.policy = policy
        self.draw = random.Random(seed)
        self.above: dict[str, str] = {}  # of each name that ever was; "": none
        self.number: dict[str, int] = {}  # of names that have one; kept while something that is known is behind it
        self.known: set[str] = set()
        self.spare = [number for number in range(60) if number % 7]

    def step(self) -> None:
        what = self.draw.random()
        if what < 0.45 or not self.known:
            self.request()
        elif what < 0.75:
            self.evict(self.draw.randrange(4))
        elif what < 0.84:
            self.forget(self.draw.choice(sorted(self.number)))
        elif what < 0.86:
            self.policy.remove(self.draw.choice([*self.spare, NOWHERE]))
        elif what < 0.9:
            self.policy.arrange(self.numbers(self.chain(self.draw.choice(list(self.above)))))
        elif what < 0.95:
            self.policy.insert(self.number[self.draw.choice(sorted(self.known))], Arrival(7, 7, "resized", -1))
        else:
            list(islice(self.policy.victims(), self.draw.randrange(20)))

    def chain(self, name: str) -> list[str]:
        chain = []
        while name:
            chain.append(name)
            name = self.above[name]
        return chain[::-1]

    def numbers(self, chain: Sequence[str]) -> list[int]:
        return [self.number.get(name, NOWHERE) for name in chain]

    def request(self) -> None:
        """A chain of old names, most of the time the latest, and a few new ones."""
        old = [*self.above, ""]
        chain = self.chain(self.draw.choice(old[-8:] if self.draw.random() < 0.7 else old))
        self.policy.touch(self.numbers(chain))
        for _ in range(self.draw.randrange(3)):
            name = f"block {len(self.above)}"
            self.above[name] = chain[-1] if chain else ""
            chain.append(name)
        for name in chain:
            if name not in self.known and not self.insert(name):
                break
        self.policy.arrange(self.numbers(chain), served=True)

    def insert(self, name: str) -> bool:
        if len(self.known) > 40 or (name not in self.number and not self.spare):
            return False
        if name not in self.number:
            self.number[name] = self.spare.pop(self.draw.randrange(len(self.spare)))
        parent = self.number[self.above[name]] if self.above[name] else -3
        tokens = self.draw.randrange(1, 100)
        self.policy.insert(self.number[name], Arrival(4 * tokens, tokens, name, parent))
        self.known.add(name)
        return True

    def evict(self, count: int) -> None:
        """The first victims, but for some that somebody needs just now."""
        name = {number: name for name, number in self.number.items()}
        for victim in list(islice(self.policy.victims(), count)):
            if victim in name and self.draw.random() < 0.8:
                self.forget(name[victim])

    def forget(self, name: str) -> None:
        self.policy.remove(self.number[name])
        self.known.discard(name)
        while name and name not in self.known and not any(self.above[other] == name for other in self.number):
            self.spare.append(self.number.pop(name))
            name = self.above[name]

    def order(self) -> list[str]:
        name = {number: name for name, number in self.number.items()}
        return [name.get(number, f"nobody's {number}") for number in self.policy.victims()]

    def faults(self) -> list[str]:
        order = self.order()
        found = []
        if len(order) != len(set(order)) or set(order) != self.known:
            found.append("the blocks are not those that came and stayed")
        if len(self.policy) != len(self.known):
            found.append("its length is not the number of blocks")
        place = {name: at for at, name in enumerate(order)}
        for name in order:
            if place.get(self.above.get(name, ""), len(order)) < place[name]:
                found.append(f"{self.above[name]} comes before {name}, which is behind it")
        return found


def faults(policy: EvictionPolicy, seed: int, steps: int = 400) -> list[str]:
    """The first promises of the contract that a policy breaks under random use."""
    driver = Driver(policy, seed)
    for _ in range(steps):
        driver.step()
        # Not after each: to look at all victims may move them.
        if driver.draw.random() < 0.2 and (found := driver.faults()):
            return found
    return []


def arrival(name: object, parent: int = -1, tokens: int = 16) -> Arrival:
    """What tests without a need of their own tell of a block."""
    return Arrival(4 * tokens, tokens, str(name), parent)


def bring(policy: EvictionPolicy, chain: Sequence[int], first: int = 0) -> None:
    """A request for a chain of blocks, of which those from place ``first`` on are new."""
    policy.touch(chain[:first])
    for place in range(first, len(chain)):
        policy.insert(chain[place], arrival(chain[place], chain[place - 1] if place else -1))
    policy.arrange(chain, served=True)


def evict(policy: EvictionPolicy, count: int = 1) -> list[int]:
    """As a tier does it that needs room: one after the other."""
    evicted: list[int] = []
    for _ in range(count):
        evicted += islice(policy.victims(), 1)
        policy.remove(evicted[-1])
    return evicted


class Contract:
    """Needs a fixture ``make``: how to make one."""

    def test_children_come_before_parents(self, make: Make, seed: int) -> None:
        for number in range(20):
            assert faults(make(), seed + number) == []

    def test_it_begins_empty(self, make: Make) -> None:
        policy = make()
        assert len(policy) == 0 and list(policy.victims()) == []

    def test_unknown_blocks_are_no_error(self, make: Make) -> None:
        policy = make()
        bring(policy, [5, 6])
        policy.touch([1, 7, NOWHERE])
        policy.arrange([7, NOWHERE])
        policy.remove(7)
        policy.remove(NOWHERE)
        assert list(policy.victims()) == [6, 5]

    def test_the_caller_may_stop_anywhere(self, make: Make) -> None:
        policy = make()
        for block in range(100):
            bring(policy, [block])
        for left in range(100, 0, -1):
            assert len(policy) == left
            evict(policy)
        assert len(policy) == 0

    def test_what_the_caller_passes_over_stays_in_the_order(self, make: Make) -> None:
        policy = make()
        for root in range(0, 100, 10):
            bring(policy, range(root, root + 10))
        for count in (1, 7, 60, 100, 100):
            assert len(list(islice(policy.victims(), count))) == count
        assert sorted(policy.victims()) == list(range(100))

    def test_parents_may_come_after_their_children(self, make: Make, seed: int) -> None:
        """As blocks do at a restart, the first to go first."""
        draw = random.Random(seed)
        for _ in range(20):
            parent = [draw.randrange(-1, block) for block in range(50)]
            policy = make()
            for block in reversed(range(50)):
                policy.insert(block, arrival(block, parent[block]))
            order = list(policy.victims())
            assert sorted(order) == list(range(50))
            assert all(order.index(block) < order.index(parent[block]) for block in range(50) if parent[block] >= 0)

    def test_a_parent_that_was_away_is_behind_its_children_again(self, make: Make) -> None:
        policy = make()
        bring(policy, [0, 1, 2])
        policy.remove(1)
        bring(policy, [3])
        policy.insert(1, arrival(1, 0))
        policy.arrange([0, 1, 2], served=True)
        order = list(policy.victims())
        assert sorted(order) == [0, 1, 2, 3] and order.index(2) < order.index(1) < order.index(0)

    def test_a_number_comes_again_for_another_block(self, make: Make) -> None:
        policy = make()
        bring(policy, [0, 1])
        policy.remove(1)
        policy.remove(0)
        bring(policy, [1, 0])
        assert list(policy.victims()) == [0, 1]

    def test_what_it_learned_is_text_that_another_takes(self, make: Make) -> None:
        policy, other = make(), make()
        for root in range(0, 100, 10):
            bring(policy, range(root, root + 10))
        other.learn(policy.state())
        other.learn("what nobody can read")
        bring(other, [0, 1])
        assert list(other.victims()) == [1, 0]
        assert other.admits(0) in (True, False)
