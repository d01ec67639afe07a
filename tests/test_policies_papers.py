"""ARC and S3-FIFO on single blocks: what their papers say, written down once more with plain lists."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Protocol

import pytest
from policy_contract import Make, arrival, evict

from kvstore.policies.arc import ARC
from kvstore.policies.s3_fifo import S3FIFO


class Paper(Protocol):
    """A cache of so many single blocks."""

    def request(self, name: int) -> int | None:
        """What was evicted for it; None when nothing was."""


class PaperARC:
    """Lists of names, the oldest first. Room is made before it is known whether the new name was seen before."""

    def __init__(self, size: int) -> None:
        self.size, self.target = size, 0.0
        self.once: list[int] = []
        self.again: list[int] = []
        self.once_gone: list[int] = []
        self.again_gone: list[int] = []

    def request(self, name: int) -> int | None:
        for held in (self.once, self.again):
            if name in held:
                held.remove(name)
                self.again.append(name)
                return None
        victim = self.make_room() if len(self.once) + len(self.again) == self.size else None
        once, again = len(self.once_gone), len(self.again_gone)
        if name in self.once_gone:
            self.target = min(self.size, self.target + max(1, again / once))
            self.once_gone.remove(name)
            self.again.append(name)
        elif name in self.again_gone:
            self.target = max(0, self.target - max(1, once / again))
            self.again_gone.remove(name)
            self.again.append(name)
        else:
            self.once.append(name)
        return victim

    def make_room(self) -> int:
        if self.once and (len(self.once) > self.target or not self.again):
            victim = self.once.pop(0)
            self.once_gone.append(victim)
        else:
            victim = self.again.pop(0)
            self.again_gone.append(victim)
        while len(self.once) + len(self.once_gone) > self.size:
            self.once_gone.pop(0)
        while len(self.once + self.again + self.once_gone + self.again_gone) > 2 * self.size:
            self.again_gone.pop(0)
        return victim


class PaperS3:
    """Lists of names, the oldest first."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.small: list[int] = []
        self.main: list[int] = []
        self.gone: list[int] = []
        self.uses: dict[int, int] = {}

    def request(self, name: int) -> int | None:
        if name in self.uses:
            self.uses[name] = min(self.uses[name] + 1, 3)
            return None
        victim = None
        while len(self.uses) == self.size:
            victim = self.from_small() if len(self.small) >= 0.1 * self.size or not self.main else self.from_main()
        self.uses[name] = 0
        (self.main if name in self.gone else self.small).append(name)
        if name in self.gone:
            self.gone.remove(name)
        return victim

    def from_small(self) -> int | None:
        name = self.small.pop(0)
        if self.uses[name] > 1:
            self.uses[name] = 0
            self.main.append(name)
            return None
        del self.uses[name]
        self.gone.append(name)
        del self.gone[: -(self.size - self.size // 10)]
        return name

    def from_main(self) -> int | None:
        name = self.main.pop(0)
        if self.uses[name]:
            self.uses[name] -= 1
            self.main.append(name)
            return None
        del self.uses[name]
        return name


@pytest.mark.parametrize(("make", "paper"), [(ARC, PaperARC), (S3FIFO, PaperS3)], ids=["ARC", "S3FIFO"])
@pytest.mark.parametrize("names", [14, 25, 60])
def test_it_evicts_what_the_paper_says(make: Make, paper: Callable[[int], Paper], names: int, seed: int) -> None:
    draw, size = random.Random(seed), 11
    policy, expected = make(), paper(size)
    number: dict[int, int] = {}
    evicted = 0
    for step in range(4000):
        most = names if step % 500 < 400 else names // 3  # what is popular changes, and how much is
        name = int(draw.random() ** 2 * most) + step // 1000 * 5
        victim = expected.request(name)
        if name in number:
            policy.touch([number[name]])
            assert victim is None
            continue
        free = len(number)
        if free == size:
            (free,) = evict(policy)
            (gone,) = (other for other, taken in number.items() if taken == free)
            assert gone == victim
            del number[gone]
            evicted += 1
        number[name] = free
        policy.touch([])
        policy.insert(free, arrival(name))
        policy.arrange([free], served=True)
    assert evicted > 300
