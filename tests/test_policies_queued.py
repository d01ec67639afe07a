"""Policies that keep blocks in queues: what each is for."""

from __future__ import annotations

from itertools import islice

import pytest
from policy_contract import arrival, bring, evict

from kvstore.policies.arc import ARC
from kvstore.policies.clock import CLOCK
from kvstore.policies.fifo import FIFO
from kvstore.policies.leaves import NONE
from kvstore.policies.lru import LRU
from kvstore.policies.s3_fifo import S3FIFO
from kvstore.policy import EvictionPolicy


def full(policy: EvictionPolicy, blocks: int) -> None:
    """Single blocks 0, 1, 2, … come in, and the tier is full for the first time."""
    for block in range(blocks):
        bring(policy, [block])
    next(policy.victims())


def test_clock_gives_a_second_chance_and_no_third() -> None:
    policy = CLOCK()
    full(policy, 4)
    for _ in range(3):
        policy.touch([0])
    assert evict(policy, 4) == [1, 2, 3, 0]


def test_clock_does_not_care_when_in_a_round_a_block_was_used() -> None:
    order = {}
    for policy in (CLOCK(), LRU()):
        full(policy, 4)
        policy.touch([2])
        policy.touch([0])
        order[type(policy)] = evict(policy, 4)
    assert order == {CLOCK: [1, 3, 0, 2], LRU: [1, 3, 2, 0]}


def test_a_parent_goes_round_like_a_block_that_was_used() -> None:
    """Once: a chain that is used no more goes in one piece."""
    policy = CLOCK()
    bring(policy, [0, 1])
    bring(policy, [4])
    bring(policy, [0, 1, 2, 3], first=2)
    policy.touch([])
    assert evict(policy, 5) == [4, 3, 2, 1, 0]


@pytest.mark.parametrize("make", [CLOCK, S3FIFO, ARC])
def test_new_blocks_are_put_leaf_first(make: type[EvictionPolicy]) -> None:
    """Also when several chains came in before the first was arranged; not once another request was seen."""
    orders = []
    for seen in (False, True):
        policy = make()
        for chain in ([0, 1, 2], [3], [4]):
            for place, block in enumerate(chain):
                policy.insert(block, arrival(block, chain[place - 1] if place else NONE))
        policy.remove(3)
        if seen:
            policy.touch([9])
        policy.arrange([0, 1, 2])
        policy.arrange([3])
        policy.arrange([4])
        policy.arrange([0, 1, 2])
        orders.append(list(policy.victims()))
    assert orders == [[2, 1, 0, 4], [2, 4, 1, 0]]


def scanned(policy: EvictionPolicy) -> set[int]:
    """What is left of blocks 0 to 7, which were used three times each, after ten times as many were used once."""
    full(policy, 8)
    for _ in range(2):
        for block in range(8):
            policy.touch([block])
    for block in range(8, 16):
        bring(policy, [block])
    for block in range(16, 96):
        evict(policy)
        bring(policy, [block])
    return {block for block in policy.victims() if block < 8}


def test_a_scan_goes_first_where_use_counts() -> None:
    left = {make: len(scanned(make())) for make in (LRU, FIFO, CLOCK, S3FIFO, ARC)}
    assert left == {LRU: 0, FIFO: 0, CLOCK: 0, S3FIFO: 8, ARC: 8}


def test_s3_fifo_takes_one_hit_wonders_first() -> None:
    """Used once more is not enough to stay, and twice more is."""
    policy = S3FIFO()
    full(policy, 6)
    policy.touch([1])
    for _ in range(2):
        policy.touch([0])
    assert evict(policy, 6) == [1, 2, 3, 4, 5, 0]


def test_s3_fifo_counts_to_three_in_its_main_queue() -> None:
    """More uses buy more rounds, but no more than three."""
    policy = S3FIFO()
    full(policy, 4)
    policy.touch(range(4))
    policy.touch(range(4))
    assert len(list(policy.victims())) == 4  # all are in the main queue
    for block, uses in enumerate((9, 1, 2, 3)):
        for _ in range(uses):
            policy.touch([block])
    assert evict(policy, 4) == [1, 2, 0, 3]


def test_s3_fifo_counts_afresh_in_its_main_queue() -> None:
    policy = S3FIFO()
    full(policy, 10)
    for block, uses in ((0, 3), (3, 2)):
        for _ in range(uses):
            policy.touch([block])
    assert evict(policy, 10) == [1, 2, 4, 5, 6, 7, 8, 9, 0, 3]


@pytest.mark.parametrize(("leaves", "order"), [([], [40, 60]), ([50], [40, 50])])
def test_a_queue_of_inner_blocks_does_not_hold_up_the_search(leaves: list[int], order: list[int]) -> None:
    """The main queue has no leaf, or one behind 40 blocks of a chain that goes on in the small queue, which holds less
    than its share: that is looked at before all of them have moved on."""
    policy, body = S3FIFO(), list(range(40))
    for chain in (body, leaves):
        bring(policy, chain)
        policy.touch(chain)
        policy.touch(chain)
    assert len(list(policy.victims())) == 40 + len(leaves)  # all are in the main queue
    bring(policy, [*body, 40], first=40)
    bring(policy, [60])
    order += [*reversed(body), *({60} - {*order})]
    assert list(policy.victims()) == order


def test_arc_gives_more_room_to_what_was_used_once_when_that_comes_back() -> None:
    """And takes it away when what was used again is missed."""
    policy = ARC()
    full(policy, 4)
    policy.touch([0])
    policy.touch([1])
    assert evict(policy, 2) == [2, 3]  # the oldest of those that were used once, and none may stay
    bring(policy, [2])
    bring(policy, [3])  # both are missed: two of those that were used once may stay from now on
    bring(policy, [4])
    bring(policy, [5])
    assert evict(policy, 2) == [0, 1]
    bring(policy, [0])
    bring(policy, [1])
    assert evict(policy, 2) == [4, 5]


@pytest.mark.parametrize("make", [S3FIFO, ARC])
def test_as_many_are_remembered_as_were_held_when_room_was_needed(make: type[EvictionPolicy]) -> None:
    """Not as many as are left when much was evicted in a row."""
    policy = make()
    full(policy, 20)
    assert evict(policy, 15) == list(range(15))
    bring(policy, [0])
    for block in range(20, 40):
        bring(policy, [block])
    assert evict(policy, 20) == [*range(15, 35)]
    assert 0 in policy.victims()


@pytest.mark.parametrize("make", [S3FIFO, ARC])
def test_nothing_is_remembered_of_what_was_forgotten(make: type[EvictionPolicy]) -> None:
    """A block that was evicted and comes back outlives one that was removed for another reason and does so."""
    policy = make()
    full(policy, 10)
    assert list(islice(policy.victims(), 2)) == [0, 1]
    assert evict(policy) == [0]
    policy.remove(1)
    bring(policy, [0])
    bring(policy, [1])
    bring(policy, [10])
    order = list(policy.victims())
    assert order.index(1) < order.index(0)
