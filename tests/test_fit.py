"""Load or recompute: what is learned from measurements."""

from __future__ import annotations

import math
import random

import pytest
from costs import TRUE, known_costs, prefill
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.policies.cost import ENOUGH, Line, Prefill, Speed
from kvstore.policies.fit import FEW, Fit

MB = 10**6
TOKEN_BYTES = 24_000
STEPS = [(layer / 12, (layer + 1) / 12) for layer in range(12)]


def passes(draw: random.Random, count: int) -> list[tuple[int, int]]:
    """New and cached tokens."""
    return [(draw.choice([1, 20, 100, 300, 700, 1500, 2500]), draw.choice([0, 0, 200, 1000])) for _ in range(count)]


@pytest.mark.parametrize("outliers", [0.0, 0.1])
def test_known_constants_come_out_of_noise(seed: int, outliers: float) -> None:
    draw, learned, true = random.Random(seed), Prefill(), (0.05, 3e-3, 4e-7, 9e-7)
    for new, cached in passes(draw, 80):
        noise = draw.lognormvariate(0, 0.04) * (draw.uniform(2, 6) if draw.random() < outliers else 1.0)
        learned.took(1, new, cached, prefill(*true, 1, new, cached) * noise)
    if not outliers:
        assert learned.costs[:2] == pytest.approx(true[:2], rel=0.15)
    for new, cached in [(2000, 0), (500, 1500), (64, 0), (64, 4000)]:
        plain = learned.seconds(1, new, cached) / learned.correction
        assert plain == pytest.approx(prefill(*true, 1, new, cached), rel=0.4 if outliers else 0.15)
        assert learned.error(1, new, cached) < (0.4 if outliers else 0.2) * plain


def test_what_is_unlike_all_that_was_seen_is_doubted(seed: int) -> None:
    draw, learned = random.Random(seed), Prefill()
    for _ in range(20):
        new = draw.randrange(20, 100)
        learned.took(1, new, 0, prefill(0.02, 3e-3, 4e-7, 9e-7, 1, new, 0) * draw.lognormvariate(0, 0.04))
    near, far = (learned.error(1, new, 0) / learned.seconds(1, new, 0) for new in (80, 8000))
    assert near < 0.05 and far > 4 * near


def test_behind_a_cache_is_taken_to_be_like_without_until_it_was_seen() -> None:
    learned = Prefill()
    for new in (10, 100, 500, 1000, 2000):
        learned.took(1, new, 0, prefill(0.01, 1e-3, 1e-6, 0, 1, new, 0))
    assert learned.costs[3] == pytest.approx(learned.costs[2]) == pytest.approx(1e-6, rel=0.1)
    for cached in (100, 500, 1000, 2000):
        learned.took(1, 300, cached, prefill(0.01, 1e-3, 1e-6, 3e-6, 1, 300, cached))
    assert learned.costs[3] == pytest.approx(3e-6, rel=0.1)
    assert learned.costs[2] == pytest.approx(1e-6, rel=0.2)


def test_rows_count_as_tokens() -> None:
    learned = Prefill()
    for rows in (1, 2, 4):
        for new in (10, 100, 500):
            learned.took(rows, new, 0, prefill(0.01, 1e-3, 1e-6, 0, rows, new, 0))
    assert learned.seconds(3, 200, 0) == pytest.approx(prefill(0.01, 1e-3, 1e-6, 0, 3, 200, 0), rel=0.1)


@given(st.lists(st.tuples(st.integers(1, 10**4), st.integers(0, 10**4), st.floats(1e-6, 1e3)), min_size=1, max_size=40))
@settings(max_examples=60, deadline=None)
def test_no_cost_is_ever_negative(seen: list[tuple[int, int, float]]) -> None:
    learned = Prefill()
    for new, cached, seconds in seen:
        learned.took(1, new, cached, seconds)
    assert learned.known == (len(seen) >= FEW)
    assert min(learned.costs) >= 0
    assert learned.seconds(1, 100, 100) >= 0
    assert 0 <= learned.error(1, 100, 100) < math.inf


def test_a_measurement_that_cannot_be_is_none() -> None:
    fit = Fit((1.0, 1.0), 0.9)
    for seconds in (0.0, -1.0, math.inf, math.nan):
        fit.saw((1.0, 1.0), seconds)
    assert not fit.known


def test_a_tier_that_changes_is_known_anew_after_few_measurements(seed: int) -> None:
    draw, speed = random.Random(seed), Speed()

    def moves(rate: float, times: int) -> None:
        for number in range(times):
            size = (MB, 5 * MB, 20 * MB)[number % 3]
            speed.moved(size, (0.001 + size / rate) * draw.lognormvariate(0, 0.1))

    def rate() -> float:
        assert speed.line is not None
        return 1 / speed.line.per_byte

    moves(100 * MB, 12)
    assert rate() == pytest.approx(100 * MB, rel=0.2)
    speed.moved(20 * MB, 4.0)
    assert rate() == pytest.approx(100 * MB, rel=0.5)  # once may be an accident
    moves(5 * MB, 9)
    assert rate() == pytest.approx(5 * MB, rel=0.3)
    moves(100 * MB, 12)
    assert rate() == pytest.approx(100 * MB, rel=0.3)


def test_a_transfers_own_time_is_told_from_that_of_its_bytes() -> None:
    speed = Speed()
    for size in (MB, 4 * MB, 16 * MB, 64 * MB, MB, 4 * MB, 16 * MB, 64 * MB):
        speed.moved(size, 0.05 + size / (100 * MB))
    assert speed.line is not None
    assert speed.line.latency == pytest.approx(0.05, rel=0.2)
    assert speed.line.seconds(100 * MB) == pytest.approx(1.05, rel=0.1)


def test_too_little_tells_nothing() -> None:
    def line(times: int, size: int) -> Line | None:
        speed = Speed()
        for _ in range(times):
            speed.moved(size, 1.0)
        return speed.line

    assert line(FEW - 1, ENOUGH) is None
    assert line(100, ENOUGH // 101) is None
    assert line(FEW, ENOUGH // 2) is not None


def test_corrections_follow_what_is_off() -> None:
    costs = known_costs()
    assert costs.load_correction == 1
    for _ in range(20):
        costs.read(1.0, 1.5)
    assert costs.load_correction == pytest.approx(1.5, rel=0.01)
    costs.read(1.0, 1000.0)  # one that is far off counts like one that is off
    assert costs.load_correction < 2
    for _ in range(30):
        costs.read(1.0, 0.8)
    assert costs.load_correction == pytest.approx(0.8, rel=0.01)
    costs.read(1e-4, 3e-3)  # moments tell nothing
    assert costs.load_correction == pytest.approx(0.8, rel=0.01)


def test_a_machine_that_becomes_slower_is_followed_at_once_and_learned_in_the_end() -> None:
    learned = known_costs().prefill
    before = learned.seconds(1, 1000, 0)
    for _ in range(4):
        learned.took(1, 1000, 0, 2 * before)
    assert 1.5 * before < learned.seconds(1, 1000, 0) < 2.2 * before
    for _ in range(100):
        for new in (50, 500, 1000, 2000):
            learned.took(1, new, 0, 2 * prefill(*TRUE, 1, new, 0))
    assert learned.seconds(1, 1000, 0) == pytest.approx(2 * before, rel=0.1)
    assert learned.correction == pytest.approx(1, abs=0.1)
