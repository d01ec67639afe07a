"""The benchmark of a Redis behind bad networks: what it counts, and that what it measures is what happens."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from servers import running

from kvstore.bench.remote import deadlines
from kvstore.bench.remote.__main__ import tables
from kvstore.bench.remote.deadlines import Times


def test_only_what_is_beyond_the_deadline_counts() -> None:
    times = Times(0.1, [0.05] * 98 + [0.3, 0.4])
    figures = times.figures()
    assert figures["calls"] == 100 and figures["p50_ms"] == pytest.approx(50.0) and figures["p50_over_ms"] == 0.0
    assert figures["p99_over_ms"] == pytest.approx(figures["p99_ms"] - 100.0) and 200.0 <= figures["p99_ms"] <= 310.0


def test_a_network_that_resets_is_measured() -> None:
    with running() as server:
        found = {mode: deadlines.measure(server, mode, 1) for mode in ("as it is", "reset")}
    assert found["reset"]["matches_until_open"] in (1, 2, 3) and found["as it is"]["matches_until_open"] == 0
    assert found["reset"]["wrong_bytes"] == found["as it is"]["wrong_bytes"] == 0
    replay = {"without": {"tokens_per_second": 1000.0, "ratio": 1.0}}
    cost = {"without_us": 10.0, "breaker_open_us": 11.0, "added_us": 1.0}
    console = Console(width=200, file=io.StringIO(), record=True)
    for table in tables({"modes": found, "match_with_breaker_open": cost, "replay": replay}):
        console.print(table)
    text = console.export_text()
    assert "never" in text and "reset" in text and "adds 1.0 us" in text
