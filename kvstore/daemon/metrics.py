"""A daemon's numbers as Prometheus reads them.

Names follow from those of ``Store.stats``: a counter NAME is ``kvstore_NAME_total``, a gauge ``kvstore_NAME``; where
NAME begins with a tier, the tier is a label instead (``disk_read_bytes``: ``kvstore_read_bytes_total{tier="disk"}``).
Every number of a store has the label ``tenant``, which is empty for the store that is always there. Counters that
people put into charts and alerts (``HELP``) are there from the beginning, as 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector, CollectorRegistry

from kvstore.daemon.trend import TIERS
from kvstore.daemon.watched import SessionInfo, Watched

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
HELP = {
    "asked_tokens": "Tokens of prompts that were looked up.",
    "hit_tokens": "Tokens of prompts that were found, by the fastest tier that had them.",
    "saved_tokens": "Tokens that were stored, those left out that were there already.",
    "saved_bytes": "Bytes of keys and values that were stored.",
    "saved_prefill_seconds": "Seconds that prefills were over earlier for what was loaded, as engines say.",
    "evicted_blocks": "Blocks that made room for others.",
    "read_bytes": "Bytes that were read from a tier.",
    "written_bytes": "Bytes that were written to a tier.",
    "corrupt_blocks": "Blocks that were not what was written, and were dropped.",
    "failed_reads": "Reads that failed.",
    "failed_writes": "Writes that failed.",
    "forgotten_blocks": "Blocks that were erased on somebody's word.",
    "expired_blocks": "Blocks that went at their time.",
}
SOURCES = {"hit_tokens": TIERS, "evicted_blocks": TIERS[:3], "read_bytes": TIERS[2:], "written_bytes": TIERS[2:]}
SAID_ALREADY = {"device_capacity"}  # among the tiers' sizes
SIZES = {
    "capacity": ("tier_capacity_bytes", "Bytes that a tier may take."),
    "used": ("tier_used_bytes", "Bytes that a tier takes."),
    "bytes": ("tier_payload_bytes", "Bytes of keys and values in a tier, without headers and padding."),
    "blocks": ("tier_blocks", "Blocks in a tier."),
}
HISTOGRAMS = {
    "reuse_gap_seconds": "Seconds between two uses of a block.",
    "idle_before_evict_seconds": "Seconds since the last use of a block when it was evicted.",
}

Labels = tuple[str, ...]
Stats = Mapping[str, Mapping[str, Any]]  # by tenant


def exposition(version: str, stats: Stats, watched: Watched) -> bytes:
    """All numbers of one moment, in Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    ProcessCollector(registry=registry)
    registry.register(_Figures(version, stats, watched))
    return generate_latest(registry)


class _Figures(Collector):
    """The families of one moment."""

    def __init__(self, version: str, stats: Stats, watched: Watched) -> None:
        self._version, self._stats, self._watched = version, stats, watched

    def collect(self) -> Iterator[Metric]:
        """See ``prometheus_client``."""
        yield from _daemon(self._version, self._watched)
        yield from _sessions(self._watched.sessions(), self._stats)
        yield from _sizes(self._stats)
        yield from _counters(self._stats)
        yield from _gauges(self._stats)
        yield from _histograms(self._stats)


def _daemon(version: str, watched: Watched) -> Iterator[Metric]:
    yield InfoMetricFamily("kvstore_build", "What is running.", value={"version": version})
    yield GaugeMetricFamily("kvstore_uptime_seconds", "Seconds since the daemon began.", watched.uptime())
    yield GaugeMetricFamily("kvstore_ready", "1 while it serves, 0 while it cannot.", float(not watched.ready()))
    yield CounterMetricFamily("kvstore_refused_connections", "Connections that were closed at once.", watched.refused())
    last = max((when for when, _ in watched.failures()), default=0.0)
    yield GaugeMetricFamily("kvstore_last_warning_timestamp_seconds", "When it last warned; 0: never.", last)


def _sessions(sessions: Iterable[SessionInfo], stats: Stats) -> Iterator[Metric]:
    count, staged = dict.fromkeys(stats, 0), dict.fromkeys(stats, 0)
    for session in sessions:
        count[session.tenant] = count.get(session.tenant, 0) + 1
        staged[session.tenant] = staged.get(session.tenant, 0) + session.staged_bytes
    for name, help, values in (
        ("kvstore_sessions", "Clients that are connected.", count),
        ("kvstore_staged_bytes", "Bytes of clients' staging areas.", staged),
    ):
        family = GaugeMetricFamily(name, help, labels=("tenant",))
        for tenant, value in values.items():
            family.add_metric((tenant,), value)
        yield family


def _sizes(stats: Stats) -> Iterator[Metric]:
    for key, (name, help) in SIZES.items():
        family = GaugeMetricFamily(f"kvstore_{name}", help, labels=("tenant", "tier"))
        for tenant, numbers in stats.items():
            for tier, sizes in numbers["tiers"].items():
                family.add_metric((tenant, tier), sizes[key])
        yield family


def _counters(stats: Stats) -> Iterator[Metric]:
    values: dict[str, dict[Labels, float]] = {name: {} for name in HELP}
    for tenant, numbers in stats.items():
        for name in HELP:
            tiers = [tier for tier in SOURCES.get(name, ()) if tier in numbers["tiers"]]
            values[name].update({(tenant, tier): 0.0 for tier in tiers} if name in SOURCES else {(tenant,): 0.0})
        for name, value in numbers["counters"].items():
            short, labels = _named(name, tenant)
            values.setdefault(short, {})[labels] = value
    for name, samples in values.items():
        family = CounterMetricFamily(f"kvstore_{name}", HELP.get(name, _words(name)), labels=_label_names(samples))
        for labels, value in samples.items():
            family.add_metric(labels, value)
        yield family


def _gauges(stats: Stats) -> Iterator[Metric]:
    values: dict[str, dict[Labels, float]] = {}
    for tenant, numbers in stats.items():
        for name, value in numbers["gauges"].items():
            if name not in SAID_ALREADY:
                short, labels = _named(name, tenant)
                values.setdefault(short, {})[labels] = value
        for tier, size in numbers["kept"]["pinned_bytes"].items():
            values.setdefault("kept_bytes", {})[tenant, tier] = size
        values.setdefault("retained_bytes", {})[tenant,] = numbers["kept"]["retained_bytes"]
        values.setdefault("leased_blocks", {})[tenant,] = numbers["leases"]
        values.setdefault("drafts", {})[tenant,] = numbers["drafts"]
    for name, samples in values.items():
        family = GaugeMetricFamily(f"kvstore_{name}", _words(name), labels=_label_names(samples))
        for labels, value in samples.items():
            family.add_metric(labels, value)
        yield family


def _histograms(stats: Stats) -> Iterator[Metric]:
    for name, help in HISTOGRAMS.items():
        values: dict[Labels, Mapping[str, Any]] = {}
        for tenant, numbers in stats.items():
            found = numbers["histograms"][name]
            if "counts" in found:
                values[tenant,] = found
            else:
                values.update({(tenant, tier): each for tier, each in found.items() if tier in numbers["tiers"]})
        family = HistogramMetricFamily(f"kvstore_{name}", help, labels=_label_names(values))
        for labels, histogram in values.items():
            bounds = [*map(str, histogram["bounds"]), "+Inf"]
            buckets = list(zip(bounds, map(float, accumulate(histogram["counts"])), strict=True))
            family.add_metric(labels, buckets, histogram["sum"])
        yield family


def _named(name: str, tenant: str) -> tuple[str, Labels]:
    """A name of ``Store.stats`` without its tier, and the labels."""
    tier, _, rest = name.partition("_")
    return (rest, (tenant, tier)) if tier in TIERS else (name, (tenant,))


def _label_names(values: Iterable[Labels]) -> Labels:
    """Of the longest of these labels; a label that is left out is empty."""
    return ("tenant", "tier")[: max(map(len, values), default=1)]


def _words(name: str) -> str:
    return f"{name.replace('_', ' ').capitalize()}."
