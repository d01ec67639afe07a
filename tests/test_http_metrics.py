"""A daemon's numbers as Prometheus reads them, and the dashboard that is made of them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from blocks import SMALL, found, ids, save
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from servers import running
from watched import NAME, PATIENCE, Watched, get, watched

import kvstore
from kvstore.bench.remote.server import wait_until
from kvstore.daemon.failures import Failures
from kvstore.daemon.http import Monitor
from kvstore.daemon.metrics import CONTENT_TYPE, HELP, exposition

DASHBOARD = Path(__file__).resolve().parent.parent / "examples" / "grafana.json"


@pytest.fixture
def both(tmp_path: Path) -> Iterator[tuple[Watched, Monitor]]:
    with watched(tmp_path) as pair:
        yield pair


def families(monitor: Monitor) -> dict[str, Metric]:
    """What is exported, by name as Prometheus stores it, but without the suffix of counters and histograms."""
    status, headers, body = get(monitor, "/metrics")
    assert (status, headers["content-type"]) == (200, CONTENT_TYPE)
    return {family.name: family for family in text_string_to_metric_families(body.decode())}


def value(family: Metric, **labels: str) -> float:
    """Of the one sample with these labels."""
    (sample,) = [sample for sample in family.samples if sample.labels == labels]
    return float(sample.value)


def test_they_are_what_the_stores_say(both: Any) -> None:
    held, monitor = both
    told = families(monitor)
    for tenant, store in held.stores.items():
        stats = store.stats()
        for tier in ("host", "disk"):
            for key, name in (("used", "used_bytes"), ("capacity", "capacity_bytes"), ("blocks", "blocks")):
                assert value(told[f"kvstore_tier_{name}"], tenant=tenant, tier=tier) == stats["tiers"][tier][key]
        counters = stats["counters"]
        assert value(told["kvstore_asked_tokens"], tenant=tenant) == counters["asked_tokens"] > 0
        assert value(told["kvstore_hit_tokens"], tenant=tenant, tier="host") == counters["host_hit_tokens"] > 0
        assert value(told["kvstore_written_bytes"], tenant=tenant, tier="disk") == counters["disk_written_bytes"] > 0
        assert value(told["kvstore_corrupt_blocks"], tenant=tenant) == 0
        assert value(told["kvstore_sessions"], tenant=tenant) == 1
    assert value(told["kvstore_refused_connections"]) == held.refused() == 3
    assert value(told["kvstore_build_info"], version=kvstore.__version__) == 1
    assert value(told["kvstore_ready"]) == 1 and value(told["kvstore_uptime_seconds"]) > 0
    assert value(told["process_resident_memory_bytes"]) > 0


def test_every_number_of_the_stores_is_there(both: Any) -> None:
    held, monitor = both
    told = families(monitor)
    for store in held.stores.values():
        stats = store.stats()
        for name in (*stats["counters"], *stats["gauges"]):
            short = re.sub("^(device|host|disk|remote)_", "", name)
            assert f"kvstore_{short}" in told, name
    assert {f"kvstore_{name}" for name in HELP} <= told.keys()


def test_form_and_names(both: Any) -> None:
    for name, family in families(both[1]).items():
        assert name.startswith(("kvstore_", "process_")) and family.documentation.endswith(".") and family.samples
        for sample in family.samples:
            suffixes = {"counter": "_total", "info": "_info", "histogram": "(_bucket|_sum|_count)"}
            assert re.fullmatch(name + suffixes.get(family.type, ""), sample.name), sample
            assert sample.labels.keys() <= {"tenant", "tier", "le", "version"}
    _, _, body = get(both[1], "/metrics")
    if shutil.which("promtool") is not None:
        subprocess.run(["promtool", "check", "metrics"], input=body, check=True, timeout=60)


def test_histograms_are_cumulative_and_count_what_was_used(both: Any) -> None:
    held, monitor = both
    store = held.stores[NAME]
    before = families(monitor)["kvstore_reuse_gap_seconds"]
    match = found(store, ids(11, 41))
    match.release()
    after = families(monitor)["kvstore_reuse_gap_seconds"]

    def buckets(family: Metric) -> list[float]:
        own = [sample for sample in family.samples if sample.labels["tenant"] == NAME]
        assert [sample.labels.get("le") for sample in own if sample.name.endswith("_bucket")][-1] == "+Inf"
        counts = [sample.value for sample in own if sample.name.endswith("_bucket")]
        assert counts == sorted(counts) and [counts[-1]] == [s.value for s in own if s.name.endswith("_count")]
        return counts

    assert buckets(after)[-1] - buckets(before)[-1] == len(match.blocks)
    idle = families(monitor)["kvstore_idle_before_evict_seconds"]
    assert {sample.labels["tier"] for sample in idle.samples} == {"host", "disk"}


def test_counters_are_there_before_anything_happens_and_never_fall(tmp_path: Path) -> None:
    def totals(stats: Mapping[str, Any]) -> dict[tuple[str, str], float]:
        text = exposition("1", {"": stats}, Watched({}, Failures())).decode()
        counters = [family for family in text_string_to_metric_families(text) if family.type == "counter"]
        return {(s.name, s.labels.get("tier", "")): s.value for family in counters for s in family.samples}

    with kvstore.open(tmp_path / "cache", host="1MiB", disk="4MiB") as store:
        before = totals(store.stats())
        assert before["kvstore_hit_tokens_total", "disk"] == before["kvstore_evicted_blocks_total", "host"] == 0
        assert before["kvstore_saved_prefill_seconds_total", ""] == 0
        assert ("kvstore_hit_tokens_total", "device") not in before
        for turn in range(40):
            save(store, ids(turn, 90)).wait()
        store.saved(0.25)
        after = totals(store.stats())
    assert all(after[name] >= value for name, value in before.items())
    assert after["kvstore_evicted_blocks_total", "host"] > 0
    assert after["kvstore_saved_prefill_seconds_total", ""] == 0.25


def test_names_that_people_choose_are_quoted() -> None:
    name = 'a"b\\c\nkvstore_ready 0'
    with kvstore.open(host="1MiB") as store:
        text = exposition("1", {name: store.stats()}, Watched({}, Failures())).decode()
    told = {family.name: family for family in text_string_to_metric_families(text)}
    assert value(told["kvstore_leased_blocks"], tenant=name) == 0
    assert [sample.value for sample in told["kvstore_ready"].samples] == [1]


def test_what_redis_holds_is_a_tier_like_others(tmp_path: Path) -> None:
    tokens = ids(800, 4 * SMALL.block_tokens)
    with running() as server, kvstore.open(tmp_path / "one", host="2MiB", disk="4MiB", redis=server.url) as one:
        save(one, tokens)
        assert one.flush(PATIENCE)
        with kvstore.open(tmp_path / "two", host="2MiB", disk="4MiB", redis=server.url) as two:
            matches = [found(two, tokens)]

            def all_is_found() -> bool:  # what comes late is known next time
                matches.append(found(two, tokens))
                return matches[-1].tokens_by_tier["remote"] == len(tokens)

            wait_until(all_is_found)
            (segment,) = two.segments()
            assert (segment.blocks, segment.tokens, segment.uses >= 1) == ({"remote": 4}, len(tokens), True)
            text = exposition("1", {"": two.stats()}, Watched({}, Failures())).decode()
    told = {family.name: family for family in text_string_to_metric_families(text)}
    assert value(told["kvstore_hit_tokens"], tenant="", tier="remote") >= len(tokens)
    assert value(told["kvstore_breaker_open"], tenant="", tier="remote") == 0
    assert value(told["kvstore_breaker_opens"], tenant="", tier="remote") == 0
    assert value(told["kvstore_corrupt_blocks"], tenant="") == 0


# -- the dashboard ----------------------------------------------------------------------------------------------------


def names_in(dashboard: Mapping[str, Any]) -> set[str]:
    """Metrics that its queries name."""
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    queries += [variable["query"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"]
    return {name for query in queries for name in re.findall(r"\b(?:kvstore|process)_\w+", query)}


def test_every_metric_of_the_grafana_dashboard_is_exported(both: Any) -> None:
    exported = {sample.name for family in families(both[1]).values() for sample in family.samples}
    named = names_in(json.loads(DASHBOARD.read_text()))
    assert len(named) > 15 and named - exported == set()
    planted = {"panels": [{"targets": [{"expr": "sum(kvstore_no_such_total)"}]}], "templating": {"list": []}}
    assert names_in(planted) - exported == {"kvstore_no_such_total"}


def test_the_grafana_dashboard_is_well_formed() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    assert all(panel["title"] and panel["targets"] for panel in panels)
    source = {"type": "prometheus", "uid": "${source}"}
    assert all(panel["datasource"] == source for panel in panels)
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken and at["x"] + at["w"] <= 24
        taken |= cells
    assert "http" not in DASHBOARD.read_text()
