"""PACE: what it learns, what it forgets, and that it is LRU until it knows better."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from blocks import namespace
from policy_contract import Contract, Driver, Make

import kvstore
from kvstore import LayerShape, Layout
from kvstore.policies.best_of import BestOf
from kvstore.policies.hazard import BINS, EDGES, PRIVATE, Hazards, bin_of, gittins
from kvstore.policies.history import History
from kvstore.policies.lru import LRU
from kvstore.policies.lru2 import LRU2
from kvstore.policies.pace import Pace
from kvstore.policies.shadow import Shadow
from kvstore.policy import EvictionPolicy

LAYOUT = Layout((LayerShape(1, 1, 1),), "uint8", block_tokens=16, alignment=512)
SPACE = namespace("")


class Ticking:
    """A clock that goes on by a drawn step whenever it is read."""

    def __init__(self, seed: int = 0) -> None:
        self.now, self._draw = 0.0, random.Random(seed)

    def __call__(self) -> float:
        self.now += self._draw.expovariate(0.2)
        return self.now


class TestContract(Contract):
    @pytest.fixture(params=[Pace, BestOf], ids=["pace", "best-of"])
    def make(self, request: pytest.FixtureRequest) -> Make:
        kind = request.param
        return lambda: kind(Ticking())


class TestSharedHistory(Contract):
    """A policy that follows what another one's tier has seen."""

    @pytest.fixture
    def make(self) -> Make:
        def made() -> EvictionPolicy:
            clock, history = Ticking(), History()
            Pace(clock, history)
            return Pace(clock, history, leads=False)

        return made


def test_it_is_lru_until_it_has_learned(seed: int) -> None:
    pace, lru = Driver(Pace(Ticking()), seed), Driver(LRU(), seed)
    for _ in range(60):
        pace.step()
        lru.step()
        assert pace.order() == lru.order()


def brute_index(hazards: list[float], at: int) -> float:
    """The definition: over all bins in which to give up, the chance of a return for each second held."""
    best, chance, seconds, alive = 0.0, 0.0, 0.0, 1.0
    widths = [*(b - a for a, b in pairwise(EDGES)), EDGES[-1]]
    for last in range(at, BINS):
        chance += alive * hazards[last]
        seconds += alive * widths[last] * (1 - hazards[last] / 2)
        alive *= 1 - hazards[last]
        best = max(best, chance / seconds)
    return best


def test_the_index_is_the_best_over_all_times_to_wait(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(100):
        hazards = [draw.random() ** draw.choice([1, 4, 16]) * 0.95 for _ in range(BINS)]
        assert gittins(hazards) == pytest.approx([brute_index(hazards, at) for at in range(BINS)], rel=1e-9)


def test_bins_hold_the_ages_between_their_edges(seed: int) -> None:
    draw = random.Random(seed)
    for age in [0.0, 0.999, 1.0, *(10 ** draw.uniform(-2, 8) for _ in range(1000))]:
        at = bin_of(age)
        assert EDGES[at] <= age * (1 + 1e-9) and (at == BINS - 1 or age < EDGES[at + 1] * (1 + 1e-9))


def test_classes_come_out_in_the_order_of_their_hazards(seed: int) -> None:
    draw, hazards = random.Random(seed), Hazards()
    for turn in range(3):
        for news in range(3):
            for _ in range(300):
                hazards.enter((PRIVATE, turn, news, 0), range(10))
                if draw.random() < 0.1 * (turn + 1) * (news + 1):
                    hazards.come_back((PRIVATE, turn, news, 0), 9)
    hazards.fit()
    worth = {(turn, news): hazards.worth((PRIVATE, turn, news, 0), 8) for turn in range(3) for news in range(3)}
    for (turn, news), value in worth.items():
        assert turn == 2 or value < worth[turn + 1, news]
        assert news == 2 or value < worth[turn, news + 1]


def chats(seed: int, sessions: int) -> list[tuple[float, list[str]]]:
    """Every other session has one long turn; the others have short ones, each a minute behind the one before."""
    draw, requests = random.Random(seed), []
    for number in range(sessions):
        at = number * 5.0
        names = [f"{number} {place}" for place in range(60)]
        if number % 2:
            requests.append((at, names))
        else:
            for turn in range(1, 9):
                requests.append((at, names[: turn * 4]))
                at += draw.uniform(55, 65)
    return sorted(requests)


def hit_blocks(policy: EvictionPolicy, clock: Ticking, seed: int) -> int:
    shadow, hits = Shadow(policy, 300), 0
    for at, names in chats(seed, 400):
        clock.now = at
        hits += shadow.request(names, [1024] * len(names))
    return hits


def test_it_keeps_what_comes_back(seed: int) -> None:
    clock = Ticking()
    learned = hit_blocks(Pace(lambda: clock.now), clock, seed)
    assert learned > 2 * hit_blocks(LRU(), clock, seed)


def test_the_best_of_several_follows_the_best(seed: int) -> None:
    clock = Ticking()
    policy = BestOf(lambda: clock.now, (lambda clock: LRU(), lambda clock: LRU2(), Pace))
    alone = hit_blocks(Pace(lambda: clock.now), clock, seed)
    assert hit_blocks(policy, clock, seed) > 0.9 * alone > 2 * hit_blocks(LRU2(), clock, seed)
    assert policy.leader == 2


def recount(history: History) -> bool:
    """Whether every stretch knows how many blocks it has."""
    places = [stretch for stretch in history._stretch if stretch is not None]
    counted = Counter([*places, *(stretch for stretch, _, _ in history._ghosts.values())])
    return all(stretch.blocks == count for stretch, count in counted.items())


def test_the_history_is_bounded_and_its_counts_are_right(seed: int) -> None:
    for number in range(5):
        history = History(ghosts=10)
        driver = Driver(Pace(Ticking(), history), seed + number)
        for _ in range(300):
            driver.step()
            assert len(history._ghosts) <= 10 and recount(history)


def test_a_block_that_was_evicted_is_not_new_when_it_returns() -> None:
    clock = Ticking()
    history = History()
    shadow = Shadow(Pace(lambda: clock.now, history), 4)
    for turn in range(3):
        clock.now += 100
        shadow.request(["a", "b", "c"], [16] * 3)
        clock.now += 10
        shadow.request([f"{turn} {place}" for place in range(8)], [16] * 8)  # nothing else has room beside it
        assert shadow.present(["a"]) == []
    returned = {kind: sum(row) for kind, row in history.hazards._returned.items() if sum(row)}
    assert set(returned) == {(PRIVATE, 0, 0, 0), (PRIVATE, 1, 0, 3), (PRIVATE, 0, 0, 6), (PRIVATE, 1, 0, 6)}


def test_what_was_learned_lasts(seed: int) -> None:
    clock = Ticking()
    first = Pace(lambda: clock.now)
    hit_blocks(first, clock, seed)
    second = Pace(lambda: clock.now)
    second.learn(first.state())
    assert len(first.state()) > 1000 and second.state() == first.state()


@pytest.mark.parametrize(
    "state",
    ["", "{", "[]", "null", '{"bins": 3, "rows": []}', f'{{"bins": {BINS}, "rows": [[[0, 1], [[1, 1, 1]]]]}}',
     f'{{"bins": {BINS}, "rows": [[[1], [[99, 1, 1]]]]}}', f'{{"bins": {BINS}, "rows": [[["x"], []]]}}'],
)  # fmt: skip
def test_what_cannot_be_read_is_not_learned(state: str) -> None:
    policy = Pace(Ticking())
    policy.learn(state)
    assert policy.state() == "" and not policy.history.learned


def test_a_restart_keeps_what_was_learned(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)

    def learned(requests: int) -> str:
        with kvstore.open(tmp_path / "cache", host="1MiB", disk="8MiB") as store:
            for _ in range(requests):
                tokens = [draw.randrange(1000) for _ in range(40)]
                drafts = store.drafts(LAYOUT, 3)
                store.save(SPACE, LAYOUT, tokens, dict(enumerate(drafts)))
            return store._residency.host_policy.state()

    before = learned(200)
    assert before and learned(0) == before


def test_it_waits_for_enough_requests() -> None:
    clock = Ticking()
    policy = Pace(lambda: clock.now)
    shadow = Shadow(policy, 1000)
    for number in range(63):
        shadow.request([str(number)], [16])
    assert policy.state() == ""
    for number in range(63, 100):
        shadow.request([str(number)], [16])
    assert policy.state() != ""
