"""The page that a daemon shows, in a real browser: real numbers of real stores, and nothing from anywhere else."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from blocks import found, ids, save
from browser import Page, Seen, visit
from watched import NAME, PATIENCE, get, told, traffic, watched

EVIL = "<img src=x onerror=alert(1)>"


class Shown(NamedTuple):
    """What was seen, what the API had said just before, and where."""

    seen: Seen
    page: Page
    status: Any
    segments: Any
    origin: str


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Shown:
    folder = tmp_path_factory.mktemp("dashboard")
    with watched(folder, every=0.02) as (held, monitor):
        main = held.stores[""]
        save(main, ids(700, 33), owner=EVIL, ttl=500.0)
        main.pin(found(main, ids(3, 43)), seconds=500.0)
        main.saved(12.0)
        logging.getLogger("kvstore").warning("a block on disk is dropped: %s", EVIL)
        before = len(told(monitor, "/api/history")["at"])
        traffic(main, ids(3, 43))
        traffic(held.stores[NAME], ids(12, 42))
        assert all(store.flush() for store in held.stores.values())
        pause = threading.Event()
        for _ in range(int(PATIENCE / 0.02)):
            if len(told(monitor, "/api/history")["at"]) > before + 2:
                break
            pause.wait(0.02)
        host, port = monitor.addresses["http"]
        status, segments = told(monitor, "/api/status"), told(monitor, "/api/segments")["segments"]
        seen = visit(f"http://{host}:{port}/", folder)
    return Shown(seen, Page(seen.dom), status, segments, f"http://{host}:{port}/")


def test_tiers_are_as_full_as_the_stores_say(shown: Shown) -> None:
    tenants = shown.status["tenants"]
    drawn = {each["data-tier"]: each for each in shown.page.numbers if each.get("class") == "tier"}
    assert drawn.keys() == {"host", "disk"}
    for tier, each in drawn.items():
        assert int(each["data-used"]) == sum(store["tiers"][tier]["used"] for store in tenants.values()) > 0
        assert int(each["data-blocks"]) == sum(store["tiers"][tier]["blocks"] for store in tenants.values()) > 0
    assert "blocks" in shown.page.texts["tiers"] and "of 6.0 MiB" in shown.page.texts["tiers"]


def test_each_tenant_has_its_quota(shown: Shown) -> None:
    rows = shown.page.rows["tenants"]
    assert rows[0][:3] == ["tenant ", "host", "disk"] and [row[0] for row in rows[1:]] == ["(main)", NAME]
    drawn = {(each["data-tenant"], each["data-tier"]): int(each["data-used"]) for each in shown.page.numbers[2:]}
    for tenant, store in shown.status["tenants"].items():
        for tier in ("host", "disk"):
            assert drawn[tenant, tier] == store["tiers"][tier]["used"]


def test_segments_that_served_most_come_first(shown: Shown) -> None:
    rows = shown.page.rows["segments"][1:]
    assert [row[0] for row in rows] == [segment["id"] for segment in shown.segments]
    first, told_first = rows[0], shown.segments[0]
    assert first[2:5] == [str(told_first[name]) for name in ("served", "uses", "tokens")]
    assert [row for row in rows if row[-1] == "pinned"] != []
    assert [row[1] for row in rows if row[-1].startswith("ends in")] == [f"(main) / {EVIL}"]


def test_found_by_tier_over_time(shown: Shown) -> None:
    assert shown.page.tags.count("rect") > 0  # something was asked for while samples were taken
    assert shown.page.texts["hit-rate"].endswith(" %") and 0 < float(shown.page.texts["hit-rate"][:-2]) < 100
    assert shown.page.texts["legend"] == "devicehostdiskremote" and "now" in shown.page.texts["rate"]
    counters = [store["counters"] for store in shown.status["tenants"].values()]
    total = sum(each.get(f"{tier}_hit_tokens", 0) for each in counters for tier in ("host", "disk"))
    assert shown.page.texts["hit-tokens"] == str(total)


def test_sessions_failures_and_state(shown: Shown) -> None:
    rows = shown.page.rows["sessions"]
    assert [row[:4] for row in rows[1:]] == [["7", "(main)", "4000", "1000"], ["8", NAME, "4001", "1001"]]
    assert shown.page.rows["failures"][1][1] == f"a block on disk is dropped: {EVIL}"
    assert shown.page.texts["state"] == "ready" and shown.page.texts["saved"] == "12 s"
    assert shown.page.texts["corrupt"] == "0" and shown.status["version"] in shown.page.texts["about"]


def test_nothing_comes_from_anywhere_else_and_nothing_is_complained_of(shown: Shown) -> None:
    assert shown.seen.console == []
    paths = {address.removeprefix(shown.origin).partition("?")[0] for address in shown.seen.asked}
    assert paths == {"api/history", "api/status", "api/segments"}
    assert "img" not in shown.page.tags  # names are text


def test_what_a_browser_complains_of_and_asks_for_is_seen(tmp_path: Path) -> None:
    """The other way round: a page that does what ours must not."""
    with watched(tmp_path / "stores") as (_, monitor):
        host, port = monitor.addresses["health"]
        there = f"http://{host}:{port}/elsewhere"
        page = tmp_path / "page.html"
        page.write_text(f"<script>console.error('planted')</script><img src='{there}'>")
        seen = visit(page.as_uri(), tmp_path)
    assert any("planted" in line for line in seen.console) and there in seen.asked


def test_a_daemon_that_is_not_ready_says_why(tmp_path: Path) -> None:
    with watched(tmp_path / "stores") as (held, monitor):
        held.why = "the directory is full"
        held.stores[NAME].close()
        host, port = monitor.addresses["http"]
        assert get(monitor, "/healthz")[0] == 503
        seen = visit(f"http://{host}:{port}/", tmp_path, 1000, "--force-dark-mode")
    page = Page(seen.dom)
    assert page.texts["state"] == "not ready: the directory is full" and seen.console == []
    assert [row[0] for row in page.rows["tenants"][1:]] == ["(main)"]
