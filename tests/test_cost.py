"""Load or recompute: the split made from what was learned is the best there is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import pytest
from costs import known_costs
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.policies.cost import HOPE, Costs, Line
from kvstore.policies.split import CLEAR_SECONDS, CLEAR_SHARE, Portion, Prospect, split

MB = 10**6
TOKEN_BYTES = 24_000
STEPS = [(layer / 12, (layer + 1) / 12) for layer in range(12)]


def on_disk(*blocks: int, rate: float, queued: int = 0, steps: Sequence[tuple[float, float]] = STEPS) -> Prospect:
    """One prompt of which these blocks are on a disk of so many bytes a second."""
    row = [Portion(tokens, "disk", tokens * TOKEN_BYTES) for tokens in blocks]
    return Prospect([row], Line(0.0, 1 / rate), queued, steps, TOKEN_BYTES, 12)


def brute(total: int, prospect: Prospect, costs: Costs) -> dict[int, float]:
    """Seconds to the first token for every number of blocks that could be loaded, by tokens; written apart."""
    found = {}
    (row,) = prospect.rows
    assert prospect.disk is not None
    for count, cut in enumerate(accumulate((portion.tokens for portion in row), initial=0)):
        size = sum(portion.bytes for portion in row[:count])
        load = (prospect.disk.latency + (prospect.queued + size) * prospect.disk.per_byte) if size else 0.0
        compute = costs.prefill.seconds(1, total - cut, cut)
        now = 0.0
        for layer in range(12):  # a layer is computed when it has come, and those before it are computed
            come = next(last for first, last in prospect.steps if first * 12 <= layer + 1e-9 < last * 12) if size else 0
            now = max(now, load * come) + compute / 12
        found[cut] = now
    return found


PARTS = st.sampled_from([STEPS, [(0.0, 1.0)], [(0.0, 1 / 12), (1 / 12, 5 / 12), (5 / 12, 9 / 12), (9 / 12, 1.0)]])


@given(
    blocks=st.lists(st.integers(16, 256), min_size=1, max_size=24),
    new=st.integers(1, 2000),
    rate=st.floats(1 * MB, 5000 * MB),
    queued=st.integers(0, 100 * MB),
    steps=PARTS,
)
@settings(max_examples=150, deadline=None)
def test_the_best_split_is_found(
    blocks: list[int], new: int, rate: float, queued: int, steps: list[tuple[float, float]]
) -> None:
    costs = COSTS
    costs.decided(from_disk=True)  # nothing is hoped for
    total, prospect = sum(blocks) + new, on_disk(*blocks, rate=rate, queued=queued, steps=steps)
    decision, every = split([total], prospect, costs, math.inf), brute(total, prospect, costs)
    everything, best = every[sum(blocks)], min(every.values())
    assert decision.first_token_seconds == pytest.approx(every[decision.loaded])
    assert decision.all_loaded_seconds == pytest.approx(everything)
    assert decision.all_computed_seconds == pytest.approx(every[0])
    clear = max(CLEAR_SECONDS, CLEAR_SHARE * everything)
    if decision.loaded == decision.matched:
        doubt = costs.prefill.error(1, total, 0)
        assert everything <= best + clear + doubt + 1e-9
    elif decision.loaded == 0:
        assert every[0] <= best + max(CLEAR_SECONDS, CLEAR_SHARE * every[0]) + 1e-9
        assert every[0] < everything
    else:
        assert every[decision.loaded] == pytest.approx(best)
        assert everything - best > clear * 0.99


@given(blocks=st.lists(st.integers(16, 256), min_size=1, max_size=16), new=st.integers(1, 1000), steps=PARTS)
@settings(max_examples=40, deadline=None)
def test_from_a_slower_disk_no_more_is_loaded(blocks: list[int], new: int, steps: list[tuple[float, float]]) -> None:
    costs, before = COSTS, math.inf
    for rate in (3000, 300, 100, 50, 30, 20, 14, 10, 7, 5, 3, 2, 1, 0.3):
        costs.decided(from_disk=True)
        loaded = split([sum(blocks) + new], on_disk(*blocks, rate=rate * MB, steps=steps), costs, math.inf).loaded
        assert loaded <= before
        before = loaded
    costs.decided(from_disk=True)


def test_a_split_hides_the_load_under_what_is_computed() -> None:
    """Both take as long: half of each, side by side, takes about half as long."""
    costs, blocks = known_costs((0.0, 2e-3, 0.0, 0.0)), [64] * 32
    decision = split([2049], on_disk(*blocks, rate=TOKEN_BYTES / 2e-3), costs, math.inf)
    assert 0.45 * 2048 <= decision.loaded <= 0.55 * 2048
    assert decision.first_token_seconds is not None and decision.all_computed_seconds is not None
    assert decision.first_token_seconds < 0.6 * decision.all_computed_seconds
    assert f"{decision.loaded} of 2048 tokens are loaded" in str(decision)


def test_little_to_win_is_no_reason_to_compute() -> None:
    tiny = known_costs((1e-4, 1e-5, 0.0, 0.0))
    row = [Portion(256, "disk", 20_000)] * 4
    slow = Prospect([row], Line(0.0, 1 / (4 * MB)), 0, [(0.0, 1.0)], 80, 2)
    decision = split([1025], slow, tiny, math.inf)
    assert decision.loaded == 1024 and decision.all_computed_seconds is not None
    assert decision.all_loaded_seconds is not None
    assert decision.all_computed_seconds < decision.all_loaded_seconds < decision.all_computed_seconds + CLEAR_SECONDS


def test_what_is_not_known_is_loaded() -> None:
    prospect = on_disk(256, 256, rate=1000)
    fresh = split([1000], prospect, Costs(), math.inf)
    assert (fresh.matched, fresh.loaded, fresh.cuts, fresh.first_token_seconds) == (512, 512, (512,), None)
    assert "how quickly the model reads" in str(fresh)
    blind = Prospect(prospect.rows, None, 0, STEPS, TOKEN_BYTES, 12)
    decision = split([1000], blind, known_costs(), math.inf)
    assert (decision.loaded, decision.first_token_seconds, decision.load_seconds) == (512, None, None)
    assert decision.all_computed_seconds and decision.opening == pytest.approx(1 / 12)
    assert "how quick the disk is" in str(decision)
    assert split([1000], prospect, known_costs(), math.inf).loaded == 0  # known, it is not


@pytest.mark.parametrize(("speed", "loaded"), [(None, 512), (5000 * MB, 512), (MB / 10, 0)])
def test_what_other_hosts_have_is_measured_by_itself(speed: float | None, loaded: int) -> None:
    row = [Portion(256, "remote", 256 * TOKEN_BYTES)] * 2
    line = None if speed is None else Line(0.0, 1 / speed)
    prospect = Prospect([row], Line(0.0, 1 / MB), 100 * MB, STEPS, TOKEN_BYTES, 12, line)
    decision = split([1000], prospect, known_costs(), math.inf)  # the disk, slow and busy, has no part in it
    assert decision.loaded == loaded
    assert ("how quick the remote tier is" in str(decision)) is (speed is None)
    assert decision.figures is not None and ("remote_bytes_per_second" in decision.figures) is (speed is not None)


def test_disk_and_other_hosts_are_read_beside_each_other() -> None:
    rows = [[Portion(256, "disk", 100), Portion(256, "remote", 50)]]
    prospect = Prospect(rows, Line(0.0, 1.0), 0, STEPS, TOKEN_BYTES, 12, Line(1.0, 1.0), 25)
    assert (prospect.seconds(100, 50), prospect.seconds(0, 50), prospect.seconds(100, 0)) == (100.0, 76.0, 100.0)
    assert prospect.seconds(10, 50) == 76.0 and prospect.seconds(0, 0) == 0.0


def test_what_is_in_memory_needs_no_disk_to_be_known() -> None:
    row = [Portion(256, "host", 0), Portion(256, "device", 0)]
    decision = split([1000], Prospect([row], None, 0, STEPS, TOKEN_BYTES, 12), known_costs(), math.inf)
    assert decision.loaded == 512 and decision.opening is None
    assert decision.first_token_seconds is not None and decision.all_computed_seconds is not None
    assert decision.first_token_seconds < decision.all_computed_seconds


def test_slow_memory_counts_too() -> None:
    costs = known_costs()
    for _ in range(8):
        costs.host.moved(10 * MB, 10.0)
    row = [Portion(256, "host", 0)] * 4
    decision = split([1100], Prospect([row], None, 0, STEPS, TOKEN_BYTES, 12), costs, math.inf)
    assert decision.loaded == 0
    assert decision.figures is not None
    assert decision.figures["host_bytes_per_second"] == pytest.approx(MB, rel=0.1)


def test_the_queue_of_the_disk_is_waited_for() -> None:
    costs, blocks = known_costs(), [256] * 8
    idle = split([2100], on_disk(*blocks, rate=100 * MB), costs, math.inf)
    busy = split([2100], on_disk(*blocks, rate=100 * MB, queued=2000 * MB), costs, math.inf)
    assert (idle.loaded, busy.loaded) == (2048, 0)
    assert busy.figures is not None and busy.figures["queued_bytes"] == 2000 * MB
    assert busy.all_loaded_seconds is not None and busy.all_loaded_seconds > 20


def test_no_load_is_begun_that_would_be_given_up() -> None:
    costs, prospect = known_costs(), on_disk(*[256] * 8, rate=100 * MB)
    assert split([2100], prospect, costs, math.inf).loaded == 2048
    decision = split([2100], prospect, costs, 0.3)
    assert 0 < decision.loaded < 2048 and decision.load_seconds is not None and decision.load_seconds <= 0.3


def test_rows_are_cut_so_that_none_loads_what_another_computes_anyway() -> None:
    """A batch computes as many columns as its longest rest; nothing of a short row need be loaded then."""
    rows = [[Portion(256, "disk", 256 * TOKEN_BYTES)] * 4, [Portion(256, "disk", 256 * TOKEN_BYTES)], []]
    prospect = Prospect(rows, Line(0.0, 1 / (10 * MB)), 0, STEPS, TOKEN_BYTES, 12)
    decision = split([1100, 300, 900], prospect, known_costs(), math.inf)
    assert decision.cuts == (256, 0, 0)  # then all rows have at most 900 tokens left, as the third has
    assert decision.loaded == 256 and decision.matched == 1280


def test_a_disk_that_has_recovered_is_tried_again() -> None:
    costs, slow = known_costs(), on_disk(*[256] * 4, rate=1.5 * MB)
    tried = 0
    while not (decision := split([1100], slow, costs, math.inf)).loaded:
        tried += 1
        assert tried < 200
    assert tried > 10 and costs.hope == 1  # it takes a while, and begins anew
    assert decision.loaded == 256  # with little
    assert HOPE**tried < 10


def test_decisions_say_what_they_knew() -> None:
    costs = known_costs()
    costs.read(1.0, 2.0)
    decision = split([600], on_disk(256, 256, rate=10 * MB, queued=5), costs, math.inf)
    assert decision.figures == {
        "queued_bytes": 5.0,
        "load_correction": costs.load_correction,
        "prefill_correction": costs.prefill.correction,
        "disk_bytes_per_second": pytest.approx(10 * MB),
    }
    assert decision.load_seconds == pytest.approx((decision.disk_seconds or 0) * costs.load_correction)
    assert str(decision) == decision.reason


COSTS = known_costs()
