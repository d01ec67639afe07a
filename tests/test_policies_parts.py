"""What policies are made of: the forest of blocks, a heap that can be read, and the names of what is gone."""

from __future__ import annotations

import random

from kvstore.policies.ghosts import Ghosts
from kvstore.policies.heap import Heap
from kvstore.policies.leaves import NONE, Leaves


def test_leaves_are_what_nothing_stands_behind(seed: int) -> None:
    """Against a plain dict; parents come before or after their children, and are lower numbers."""
    draw = random.Random(seed)
    leaves, parent = Leaves(), dict[int, int]()
    for _ in range(1500):
        block = draw.randrange(40)
        if draw.random() < 0.6:
            above = draw.randrange(-2, block) if block else NONE
            assert leaves.add(block, above) == (block not in parent)
            parent.setdefault(block, max(above, NONE))
        else:
            above = parent.pop(block, NONE)
            bare = above in parent and above not in parent.values()
            assert leaves.discard(block) == (above if bare else NONE)
        assert [block in leaves for block in range(-3, 50)] == [block in parent for block in range(-3, 50)]
        assert all(leaves.is_leaf(block) == (block not in parent.values()) for block in parent)
        assert {block: leaves._parent[block] for block in parent} == parent and len(leaves) == len(parent)
    left, gone = dict(parent), dict[int, int]()
    for block in sorted(parent, reverse=True):
        above = left.pop(block)
        bare = above in left and above not in left.values()
        assert leaves.uncovered(block, gone) == (above if bare else NONE)
    assert len(leaves) == len(parent)


def test_columns_grow_with_the_blocks() -> None:
    leaves = Leaves()
    uses, worth, names = leaves.integers(), leaves.floats(), leaves.names()
    leaves.add(5, 9000)
    uses[9000], worth[5], names[9000] = 1 << 40, 0.5, "a"
    leaves.add(100_000, NONE)
    assert (uses[9000], worth[5], names[9000]) == (1 << 40, 0.5, "a")
    assert (uses[100_000], worth[100_000], names[100_000]) == (0, 0.0, None)


def test_a_heap_is_read_in_order_and_stays_as_it_is(seed: int) -> None:
    draw = random.Random(seed)
    heap, rank = Heap(), dict[int, float]()
    for _ in range(3000):
        block = draw.randrange(100)
        if draw.random() < 0.7:
            rank[block] = draw.random()
            heap.put(block, rank[block])
        else:
            rank.pop(block, None)
            heap.drop(block)
        assert len(heap) <= 2 * 100 + 64
        walk, added = heap.walk(), draw.random()
        walk.add(1000, added)
        order = sorted([*rank.items(), (1000, added)], key=lambda item: item[1])
        for expected, _ in order[: draw.randrange(len(order) + 1)]:
            assert walk.next() == expected
    walk = heap.walk()
    assert [walk.next() for _ in range(len(rank) + 1)] == [*sorted(rank, key=rank.__getitem__), NONE]


def test_ghosts_are_the_latest_names() -> None:
    ghosts = Ghosts()
    for number, name in enumerate(["a", "b", "c", "a", "d"]):
        ghosts.remember(name, number)
    assert len(ghosts) == 4
    ghosts.trim(3)
    assert [name in ghosts for name in "abcd"] == [True, False, True, True]
    assert [ghosts.recall(name) for name in ("a", "a", "b", "d")] == [3, NONE, NONE, 4]
    ghosts.trim(-1)
    assert len(ghosts) == 0
